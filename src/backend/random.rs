//! The counter-based generator of every backend: what is drawn depends on the request's seed and the token's
//! absolute position, not on batch, rank or schedule.
