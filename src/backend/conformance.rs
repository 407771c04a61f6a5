//! Op tests, written once and instantiated for every backend.
