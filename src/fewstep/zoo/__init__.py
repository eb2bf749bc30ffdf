"""The bundled teachers and how they were trained."""
