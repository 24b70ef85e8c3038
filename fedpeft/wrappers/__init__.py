"""What goes around a method without the method knowing."""
