//! `sledge serve --take-over`: the place of a relay that runs, without refusing a connection.
//!
//! The running relay passes its listening sockets, answers what it has accepted, closes its connections and its store. Whoever
//! connects meanwhile waits in the system's queue.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::store::{self, Access, Opened};
use crate::config::Config;
use crate::error::Error;
use crate::server::control::{Answer, FILE, Request};
use crate::server::{Sockets, handover};

/// Time for the running relay to pass its sockets.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// Time between two tries at the store, whose lock tells nobody when it is free.
const TRY_EVERY: Duration = Duration::from_millis(10);

/// Time that a relay may take to stop beyond its `stop_timeout_ms`, until its process has ended.
const ENDING_TIME_MAX: Duration = Duration::from_secs(10);

/// Opens the store, taking it over from the relay that has it; the sockets of that relay, if there is one.
///
/// # Errors
/// [`Error::Failed`] when the relay does not answer or does not end.
pub fn open(config: &Config) -> Result<(Opened, Option<Sockets>), Error> {
    let url = match store::reach_or_open(config)? {
        Access::Own(store) => return Ok((store, None)),
        Access::Relay(url) => url,
    };
    tracing::info!(relay = url.trim_start_matches("ws://"), "taking over");
    let sockets = ask(config)?;
    let deadline = Instant::now() + config.limits.stop_timeout() + ENDING_TIME_MAX;
    loop {
        match store::reach_or_open(config) {
            Ok(Access::Own(store)) => return Ok((store, Some(sockets))),
            // While it ends it still names itself as the owner, or no longer.
            Ok(Access::Relay(_)) | Err(Error::Failed(_)) if Instant::now() < deadline => std::thread::sleep(TRY_EVERY),
            Ok(Access::Relay(url)) => return Err(Error::Failed(format!("the relay on {url} does not end"))),
            Err(error) => return Err(error),
        }
    }
}

fn ask(config: &Config) -> Result<Sockets, Error> {
    let path = config.control_dir().join(FILE);
    let failed = |what: String| Error::Failed(format!("cannot take over from the running relay: {what}"));
    let converse = || {
        let socket = UnixStream::connect(&path)?;
        socket.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        socket.set_write_timeout(Some(ANSWER_TIME_MAX))?;
        (&socket).write_all(format!("{}\n", serde_json::to_string(&Request::HandOver)?).as_bytes())?;
        handover::receive(&socket)
    };
    let (line, listeners) =
        converse().map_err(|error: std::io::Error| failed(format!("{error} ({})", path.display())))?;
    let mut listeners = listeners.into_iter();
    match (listeners.next(), serde_json::from_slice(&line)) {
        (Some(plain), Ok(Answer::Listener)) => Ok(Sockets { plain, encrypted: listeners.next() }),
        (_, Ok(Answer::Error(problem))) => Err(failed(problem)),
        _ => Err(failed("it does not know how; stop it and start this one".to_owned())),
    }
}
