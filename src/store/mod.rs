//! The store (placeholder of this branch).
pub mod index;
