//! Less memory for a process with many threads, where memory is scarce.
//!
//! glibc gives each thread an allocation arena of its own, and what the threads of import and index free in one is of no
//! use to the others: importing 1,000,000 events with a budget of 64 MiB took 299 MB so and 211 with few arenas, for
//! about 8 % more processor time. Without unsafe code the number can only be set from outside, by an environment variable
//! that is read at the start of a process. So the process starts itself again with it: same process id, same arguments.

use crate::config::Config;

/// What glibc reads; a user's own value stands.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const VARIABLE: &str = "MALLOC_ARENA_MAX";
/// One for the thread that writes, one for the others.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENAS: &str = "2";

/// Starts this process again with fewer arenas, where memory is scarce and that was not done yet. Must come before
/// anything that a new start would repeat. Where it cannot be done, the process goes on as it is.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn limit(config: &Config) {
    use std::os::unix::process::CommandExt;

    if !config.memory.is_scarce() || std::env::var_os(VARIABLE).is_some() {
        return;
    }
    // Not /proc/self/exe: the process would be called "exe".
    let Ok(program) = std::env::current_exe() else { return };
    let mut arguments = std::env::args_os();
    let mut again = std::process::Command::new(program);
    if let Some(name) = arguments.next() {
        again.arg0(name);
    }
    let error = again.args(arguments).env(VARIABLE, ARENAS).exec();
    tracing::debug!(%error, "the number of allocation arenas stays as it is");
}

/// Other allocators have no such arenas.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn limit(_config: &Config) {}
