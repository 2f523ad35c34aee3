//! The `sledge` binary, run in a directory of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use sledge::protocol::Event;
use tempfile::TempDir;

use super::client::PATIENCE;
use super::json_of;
use super::relay::SERVICE_URL;

/// A working directory with a `sync.toml` and a data directory, and the commands run in it.
pub struct Binary {
    home: TempDir,
    data: PathBuf,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Asserts success; what was printed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stdout
    }

    /// Asserts the exit code of a failure; what was said about it.
    #[track_caller]
    pub fn fails(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stderr
    }
}

impl Binary {
    pub fn new() -> Binary {
        let home = TempDir::new().expect("a temporary directory");
        let data = home.path().join("data");
        Binary::at(home, data)
    }

    /// For the data directory of a relay that was stopped.
    pub fn on(data: &Path) -> Binary {
        Binary::at(TempDir::new().expect("a temporary directory"), data.to_owned())
    }

    /// For a store that is no directory.
    #[cfg(feature = "postgres")]
    pub fn on_store(url: String) -> Binary {
        Binary::at(TempDir::new().expect("a temporary directory"), url.into())
    }

    fn at(home: TempDir, data: PathBuf) -> Binary {
        let binary = Binary { home, data };
        binary.configure(&format!("service_url = \"{SERVICE_URL}\"\n"));
        binary
    }

    /// Replaces `sync.toml`.
    pub fn configure(&self, toml: &str) {
        std::fs::write(self.home.path().join("sync.toml"), toml).expect("a writable directory");
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Writes a file beside `sync.toml` and gives its path.
    pub fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.home.path().join(name);
        std::fs::write(&path, bytes).expect("a writable directory");
        path.to_str().expect("a temporary directory with a plain name").to_owned()
    }

    /// `sledge --store DATA …`, not yet started. Nothing of the caller's environment decides what it reads.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sledge"));
        command.current_dir(self.home.path()).env_remove("SLEDGE_CONFIG").env_remove("SLEDGE_LOG");
        command.arg("--store").arg(&self.data).args(args);
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.run_with(args, b"")
    }

    /// Runs a command to its end, with `stdin` as its input.
    pub fn run_with(&self, args: &[&str], stdin: &[u8]) -> Ran {
        let mut command = self.command(args);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        finish(child.expect("the binary is built"), stdin, args)
    }

    /// Imports events given as values and asserts that the run succeeded.
    #[track_caller]
    pub fn import<'e>(&self, events: impl IntoIterator<Item = &'e Event>) -> Ran {
        let ran = self.run_with(&["import", "-"], lines(events).as_bytes());
        assert_eq!(ran.code, Some(0), "stdout: {}\nstderr: {}", ran.stdout, ran.stderr);
        ran
    }

    /// The lines of `export`.
    #[track_caller]
    pub fn export(&self) -> Vec<String> {
        self.run(&["export"]).ok().lines().map(str::to_owned).collect()
    }

    /// The ids of what `export` gives, sorted.
    #[track_caller]
    pub fn exported_ids(&self) -> Vec<String> {
        let mut ids: Vec<String> = self.export().iter().map(|line| id_of(line)).collect();
        ids.sort();
        ids
    }

    /// Starts `serve` on a free port and waits until it listens.
    pub fn serve(&self) -> Serving {
        self.serve_on(([127, 0, 0, 1], 0).into())
    }

    /// As [`Binary::serve`], on an address that clients know already.
    pub fn serve_on(&self, addr: SocketAddr) -> Serving {
        self.serve_with(&["--listen", &addr.to_string()], &[])
    }

    /// Starts `serve` with these arguments and further environment, and waits until it listens.
    pub fn serve_with(&self, args: &[&str], env: &[(&str, &str)]) -> Serving {
        let mut command = self.command(&[&["serve"], args].concat());
        command.envs(env.iter().copied());
        Serving::start(command)
    }

    /// Starts `serve` as systemd does with a socket unit: the listening socket is open as number 3.
    pub fn serve_passing(&self, listener: std::net::TcpListener) -> Serving {
        let sledge = self.command(&["serve"]);
        let script = "exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(sledge.get_program()).args(sledge.get_args());
        command.current_dir(self.home.path()).env_remove("SLEDGE_CONFIG").env_remove("SLEDGE_LOG");
        let child = command.stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        Serving::wait(child.expect("there is a shell"))
    }
}

/// A relay in a process of its own; killed when dropped.
pub struct Serving {
    child: Child,
    addr: SocketAddr,
    /// What was logged before it listened.
    before: Vec<String>,
    stderr: Receiver<String>,
}

impl Serving {
    /// Starts a command that serves and waits until it listens.
    pub fn start(mut command: Command) -> Serving {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        Serving::wait(child.expect("the binary is built"))
    }

    fn wait(mut child: Child) -> Serving {
        let (lines, stderr) = channel();
        let pipe = BufReader::new(child.stderr.take().expect("it is piped"));
        thread::spawn(move || pipe.lines().map_while(Result::ok).for_each(|line| drop(lines.send(line))));
        let mut seen = Vec::new();
        while let Ok(line) = stderr.recv_timeout(PATIENCE) {
            if let Some(addr) = address_in(&line) {
                return Serving { child, addr, before: seen, stderr };
            }
            seen.push(line);
        }
        let _ = child.kill();
        let _ = child.wait();
        panic!("serve never said where it listens:\n{}", seen.join("\n"));
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// kill -9, at once.
    pub fn kill(&mut self) {
        self.child.kill().expect("the process is ours");
        self.child.wait().expect("the process is ours");
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        let status = Command::new("sh").arg("-c").arg(format!("kill -{name} {}", self.child.id())).status();
        assert!(status.expect("sh is there").success());
    }

    /// Waits for a line of the log that contains `text`, and gives it.
    pub fn wait_for_line(&self, text: &str) -> String {
        if let Some(line) = self.before.iter().find(|line| line.contains(text)) {
            return line.clone();
        }
        let mut seen = Vec::new();
        while let Ok(line) = self.stderr.recv_timeout(PATIENCE) {
            if line.contains(text) {
                return line;
            }
            seen.push(line);
        }
        panic!("the log never said {text:?}:\n{}", seen.join("\n"));
    }

    /// Waits for the end; the status and what was logged since the start.
    pub fn wait_for_end(mut self) -> (ExitStatus, String) {
        let mut log = Vec::new();
        // The pipe closes with the process.
        while let Ok(line) = self.stderr.recv_timeout(PATIENCE) {
            log.push(line);
        }
        let status = self.child.try_wait().expect("the process is ours");
        let status = status.or_else(|| self.child.wait().ok()).expect("the process ends with its stderr");
        (status, log.join("\n"))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Feeds a child and collects what it says; kills it and fails when it does not end.
pub fn finish(mut child: Child, stdin: &[u8], what: &[&str]) -> Ran {
    let mut input = child.stdin.take().expect("it is piped");
    let stdin = stdin.to_owned();
    // A command may end without having read its input.
    let feed = thread::spawn(move || drop(input.write_all(&stdin)));
    let (done, outputs) = channel();
    let mut stdout = child.stdout.take().expect("it is piped");
    let mut stderr = child.stderr.take().expect("it is piped");
    let errors = thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).expect("messages are text");
        text
    });
    thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).expect("output is text");
        drop(done.send(text));
    });
    let Ok(stdout) = outputs.recv_timeout(PATIENCE) else {
        let _ = child.kill();
        let _ = child.wait();
        panic!("{what:?} does not end");
    };
    let code = child.wait().expect("the process is ours").code();
    feed.join().expect("writing does not panic");
    Ran { code, stdout, stderr: errors.join().expect("messages are text") }
}

/// Events as JSON lines.
pub fn lines<'e>(events: impl IntoIterator<Item = &'e Event>) -> String {
    events.into_iter().map(|event| json_of(event) + "\n").collect()
}

/// The id of the event in a line of JSON.
pub fn id_of(line: &str) -> String {
    let event: serde_json::Value = serde_json::from_str(line).expect("an event a line");
    event["id"].as_str().expect("an event has an id").to_owned()
}

fn address_in(line: &str) -> Option<SocketAddr> {
    let rest = line.split_once("listening on ws://")?.1;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.' && c != ':').unwrap_or(rest.len());
    rest[..end].parse().ok()
}
