//! What systemd and a service talk about: the socket it passes, and the state it is told (`sd_notify(3)`).
//!
//! Without systemd, or without `Type=notify`, nothing of this does anything.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use listenfd::ListenFd;

/// Tells the service manager how the relay is.
#[derive(Debug)]
pub struct Manager {
    socket: Option<UnixDatagram>,
    /// A sign of life is expected this often.
    watchdog: Option<Duration>,
}

impl Manager {
    /// As the environment says.
    pub fn from_env() -> Manager {
        let socket = std::env::var_os("NOTIFY_SOCKET").and_then(|name| connect(name.as_bytes()));
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|micros| is_ours && *micros > 0).map(Duration::from_micros);
        Manager { socket, watchdog }
    }

    /// The relay serves.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The settings are being read again; [`Manager::ready`] follows.
    pub fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let micros = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// The relay stops.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// A line for `systemctl status`.
    pub fn status(&self, text: &str) {
        self.tell(&format!("STATUS={}", text.replace('\n', " ")));
    }

    /// The relay lives.
    pub fn alive(&self) {
        self.tell("WATCHDOG=1");
    }

    /// Time between two signs of life: half of what is allowed, as the manual advises. `None`: nobody waits for one.
    pub fn sign_of_life_every(&self) -> Option<Duration> {
        self.watchdog.map(|watchdog| watchdog / 2)
    }

    fn tell(&self, state: &str) {
        if let Some(socket) = &self.socket
            && let Err(error) = socket.send(state.as_bytes())
        {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }
}

/// A name that starts with `@` is in Linux's abstract space.
fn connect(name: &[u8]) -> Option<UnixDatagram> {
    let address = match name.split_first()? {
        (b'@', rest) => SocketAddr::from_abstract_name(rest),
        _ => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name)),
    };
    let socket = UnixDatagram::unbound().ok()?;
    // A manager that does not read must not hold up the relay.
    socket.set_nonblocking(true).ok()?;
    socket.connect_addr(&address.ok()?).ok()?;
    Some(socket)
}

/// The listening socket that systemd holds for this service (`sledge.socket`), if it does. It must be asked for before
/// threads are made.
pub fn passed_listener() -> Option<std::net::TcpListener> {
    match ListenFd::from_env().take_tcp_listener(0) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(%error, "the socket that was passed cannot be listened on");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Each state arrives as one datagram, at a path and in the abstract space; nobody listening is no error.
    #[test]
    fn states_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let listening = UnixDatagram::bind(&path).unwrap();
        let manager = Manager { socket: connect(path.as_os_str().as_bytes()), watchdog: Some(Duration::from_secs(10)) };
        let heard = |listening: &UnixDatagram| {
            let mut bytes = [0; 256];
            let len = listening.recv(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes[..len]).into_owned()
        };
        manager.ready();
        assert_eq!(heard(&listening), "READY=1");
        manager.reloading();
        assert!(heard(&listening).starts_with("RELOADING=1\nMONOTONIC_USEC="));
        manager.status("two\nlines");
        assert_eq!(heard(&listening), "STATUS=two lines");
        assert_eq!(manager.sign_of_life_every(), Some(Duration::from_secs(5)));
        drop(listening);
        manager.alive();

        let name = format!("@sledge-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name.as_bytes()[1..]).unwrap();
        let listening = UnixDatagram::bind_addr(&address).unwrap();
        Manager { socket: connect(name.as_bytes()), watchdog: None }.stopping();
        assert_eq!(heard(&listening), "STOPPING=1");
        assert!(connect(b"").is_none());
    }
}
