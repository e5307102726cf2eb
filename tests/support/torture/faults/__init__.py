"""The faults, by kind. A function is a fault: its docstring says what a user does, its attempts what must hold."""
