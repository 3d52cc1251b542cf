"""The study: what each part of FocusLLaVA brings, beside the control that could refute it."""
