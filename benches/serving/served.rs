//! A relay in a process of its own, with events in its store.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sledge::store::Store;
use sledge::store::embedded::{EmbeddedStore, Options};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message, WebSocket};

use crate::support;

/// How long a client of the bench waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub type Socket = WebSocket<TcpStream>;

pub struct Served {
    child: Child,
    pub addr: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Served {
    /// Stores events and serves them with the built-in settings.
    pub fn start(events: usize) -> Served {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(folder.path(), &Options::default()).unwrap();
        let now = support::START + 100_000_000;
        support::events(events).chunks(1_000).for_each(|batch| drop(store.apply(batch, now).unwrap()));
        store.merge_index().unwrap();
        drop(store);
        let mut command = match std::env::var("SERVING_CORE") {
            Ok(core) => {
                let mut command = Command::new("taskset");
                command.args(["-c", &core, env!("CARGO_BIN_EXE_sledge")]);
                command
            }
            Err(_) => Command::new(env!("CARGO_BIN_EXE_sledge")),
        };
        command.arg("--store").arg(folder.path()).args(["serve", "--listen", "127.0.0.1:0"]);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok);
        let line = lines.find(|line| line.contains("listening on ws://")).expect("the relay starts");
        let addr = line.rsplit("ws://").next().unwrap().trim().parse().unwrap();
        // What it says later is read, so that it never waits for it.
        std::thread::spawn(move || lines.for_each(drop));
        Served { child, addr, _folder: folder }
    }

    /// Memory of the relay's process.
    pub fn rss_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).map_or(f64::NAN, |kib| kib / 1024.0)
    }

    /// A socket without a handshake; it reads with patience.
    pub fn tcp(&self) -> TcpStream {
        let socket = TcpStream::connect(self.addr).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_nodelay(true).unwrap();
        socket
    }

    /// A client from this address, as a reverse proxy says; `None`: from this machine, for which there are no limits. Fails
    /// where the relay does not take it.
    pub fn client(&self, from: Option<&str>) -> Result<Socket, String> {
        let mut request = format!("ws://{}/", self.addr).into_client_request().unwrap();
        if let Some(ip) = from {
            request.headers_mut().insert("X-Forwarded-For", ip.parse().unwrap());
        }
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let shaken = tungstenite::client::client_with_config(request, self.tcp(), Some(config));
        shaken.map(|(socket, _)| socket).map_err(|error| error.to_string())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks, and reads to the end of the stored events; how many there were. `None`: the connection has ended.
pub fn ask(socket: &mut Socket, id: &str, filter: &str) -> Option<usize> {
    socket.send(Message::text(format!("[\"REQ\",\"{id}\",{filter}]"))).ok()?;
    let (eose, closed) = (format!("[\"EOSE\",\"{id}\""), format!("[\"CLOSED\",\"{id}\""));
    let mut events = 0;
    loop {
        match socket.read().ok()? {
            Message::Text(text) if text.starts_with(&eose) => {
                socket.send(Message::text(format!("[\"CLOSE\",\"{id}\"]"))).ok()?;
                return Some(events);
            }
            Message::Text(text) if text.starts_with(&closed) => return Some(events),
            Message::Text(text) if text.starts_with("[\"EVENT\"") => events += 1,
            Message::Close(_) => return None,
            _ => {}
        }
    }
}
