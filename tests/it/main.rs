//! The integration tests: one binary, a module a subject. Traps carry their number in the name.
//!
//! Nothing here sleeps to wait and nothing is timed: a test waits for the message that proves its point, and a
//! time-out only ends a test that has failed already. Absence is proved by a later message that did arrive.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

mod backup;
mod cli;
mod client_cli;
mod client_crash;
mod client_import;
mod client_link;
mod client_refusals;
mod client_sync;
mod client_tls;
mod compression;
mod crash;
mod ephemeral;
mod fanout;
mod fault;
mod full_disk;
mod hostile;
mod hostile_load;
mod http;
mod layering;
mod leaks;
mod mirror;
mod model;
mod nip01_events;
mod nip01_filters;
mod nip01_replaceable;
mod nip01_subscriptions;
mod nip09;
mod nip11;
mod nip13;
mod nip40;
mod nip42;
mod nip43;
mod nip45;
mod nip62;
mod nip67;
mod nip70;
mod nip77;
mod nip86;
mod operation;
mod operator;
mod plugin;
mod policy;
#[cfg(feature = "postgres")]
mod postgres;
mod powercut;
mod rate;
mod real_events;
mod retention;
mod shapes;
mod simulation;
mod slots;
mod small_machine;
mod store_suite;
mod thirty_days;
mod tls;
mod typescript;
mod upgrade;
mod upkeep;
