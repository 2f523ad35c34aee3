//! The sync engine's rules as plain functions: no socket, no disk, no clock, no task.

pub mod reconcile;
