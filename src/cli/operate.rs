//! A running relay and those who look after it: signals, changes of the settings file, the service manager.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};

use super::interrupt::Interrupt;
use super::systemd::Manager;
use super::{load_config, logging};
use crate::client::mirrors::Mirrors;
use crate::config::Config;
use crate::error::Error;
use crate::server::Server;

/// Time between two looks at the settings file. A look is one system call and reads nothing.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Time between two signs of life where nobody waits for one.
const UNWATCHED: Duration = Duration::from_secs(24 * 60 * 60);

/// Where the settings came from, to read them again in the same way.
#[derive(Clone, Debug)]
pub struct Reread {
    /// `--config`.
    pub file: Option<PathBuf>,
    /// `--store`.
    pub store: Option<String>,
    /// `--listen`.
    pub listen: Option<std::net::SocketAddr>,
}

impl Reread {
    /// The settings as they are now.
    fn read(&self) -> Result<Config, Error> {
        let mut config = load_config(self.file.as_deref(), self.store.clone())?;
        if let Some(listen) = self.listen {
            config.listen = listen;
        }
        Ok(config)
    }
}

/// What may end or change a running relay.
pub struct Operation {
    interrupt: Interrupt,
    hangup: Signal,
    manager: Manager,
    reread: Reread,
}

impl Operation {
    /// Watches from now on. Needs a runtime.
    ///
    /// # Errors
    /// When the system gives no signal handler.
    pub fn watch(interrupt: Interrupt, manager: Manager, reread: Reread) -> Result<Operation, Error> {
        let hangup = signal(SignalKind::hangup())
            .map_err(|error| Error::Failed(format!("cannot listen for signals: {error}")))?;
        Ok(Operation { interrupt, hangup, manager, reread })
    }

    /// Looks after the relay until somebody asks for its end.
    pub async fn run(&mut self, server: &Server, mirrors: &mut Mirrors) {
        let mut file = server.config().origin.file.clone();
        let mut watched = Watched::new(file.as_deref());
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut alive = interval(self.manager.sign_of_life_every().unwrap_or(UNWATCHED));
        self.manager.ready();
        loop {
            tokio::select! {
                () = self.interrupt.wait() => break,
                () = server.handed_over() => {
                    tracing::info!("another process takes over");
                    break;
                }
                _ = alive.tick() => self.manager.alive(),
                _ = self.hangup.recv() => {
                    self.reload(server, mirrors, "SIGHUP");
                    file = server.config().origin.file.clone();
                    watched = Watched::new(file.as_deref());
                }
                _ = look.tick() => {
                    reload_certificate(server);
                    if file.is_some() && watched.has_changed(file.as_deref().and_then(stamp_of)) {
                        self.reload(server, mirrors, "the settings file has changed");
                    }
                }
            }
        }
        self.manager.stopping();
    }

    /// Reads the settings again. Whatever is wrong with them, the old ones stay in force.
    fn reload(&self, server: &Server, mirrors: &mut Mirrors, why: &str) {
        self.manager.reloading();
        let reloaded = self.reread.read().and_then(|wanted| {
            let wanted_mirrors = super::serve::mirrors(&wanted)?;
            let reloaded = server.reload(&wanted)?;
            mirrors.change(wanted_mirrors);
            Ok(reloaded)
        });
        match reloaded.and_then(|reloaded| logging::change_level(&reloaded.config).map(|()| reloaded)) {
            Ok(reloaded) => {
                let (applied, restart) = (reloaded.applied.join(" "), reloaded.needs_restart.join(" "));
                tracing::info!(why, applied, "settings read again");
                if !restart.is_empty() {
                    tracing::warn!(keys = restart, "these settings have changed and need a restart");
                }
                super::serve::raise_open_files(&reloaded.config);
                self.manager.status(&format!("settings read again: {why}"));
            }
            Err(error) => {
                tracing::error!(%error, why, "the settings cannot be used; the old ones stay in force");
                self.manager.status(&format!("the old settings are in force: {error}"));
            }
        }
        self.manager.ready();
    }
}

fn reload_certificate(server: &Server) {
    match server.reload_certificate() {
        Ok(true) => tracing::info!("the renewed certificate is in use"),
        Ok(false) => {}
        Err(error) => tracing::error!(%error, "the old certificate stays in use"),
    }
}

/// What tells one version of a file from another: an editor may write into it or put another in its place.
type Stamp = (SystemTime, u64, u64);

/// The version of the settings file that was read.
struct Watched {
    read: Option<Stamp>,
    seen: Option<Stamp>,
}

impl Watched {
    fn new(file: Option<&Path>) -> Watched {
        let stamp = file.and_then(stamp_of);
        Watched { read: stamp, seen: stamp }
    }

    /// Whether there is a new version that was the same at two looks: an editor is not done before. A file that is being
    /// replaced may be missing for a moment.
    fn has_changed(&mut self, now: Option<Stamp>) -> bool {
        let is_settled = now.is_some() && std::mem::replace(&mut self.seen, now) == now;
        is_settled && std::mem::replace(&mut self.read, now) != now
    }
}

fn stamp_of(file: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(file).ok()?;
    Some((meta.modified().ok()?, meta.len(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A version is read once, and only when it has held still from one look to the next.
    #[test]
    fn a_file_is_read_when_its_editor_is_done() {
        let stamp = |len| Some((SystemTime::UNIX_EPOCH, len, 1));
        let mut watched = Watched { read: stamp(1), seen: stamp(1) };
        let looks = [stamp(1), None, stamp(0), stamp(5), stamp(5), stamp(5), stamp(1), stamp(1)];
        let changed: Vec<bool> = looks.into_iter().map(|now| watched.has_changed(now)).collect();
        assert_eq!(changed, [false, false, false, false, true, false, false, true]);
    }
}
