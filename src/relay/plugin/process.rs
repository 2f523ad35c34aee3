//! One run of the plugin's program: its process group, its pipes, its end.

use std::io::{BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::wire::read_line;

/// How long a program that was asked to end may take before it is killed.
const END_TIME_MAX: Duration = Duration::from_secs(1);
/// Between two looks whether it has ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Bytes of a line of standard error that are logged.
const LOG_LINE_BYTES_MAX: usize = 2_000;

/// A started program.
pub struct Process {
    child: Child,
    group: Group,
}

/// The program and whatever it has started: a shell command is two processes or more.
#[derive(Clone, Copy, Debug)]
pub struct Group(Option<Pid>);

/// The program's standard input.
pub struct Input(Option<ChildStdin>);

impl Process {
    /// Starts a shell command in a process group of its own.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn start(command: &str) -> std::io::Result<Process> {
        let child = Command::new("/bin/sh")
            .args(["-c", command])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let group = Group(i32::try_from(child.id()).ok().and_then(Pid::from_raw));
        Ok(Process { child, group })
    }

    /// What ends it.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Where its answers come from and events go; to be called once.
    pub fn take_pipes(&mut self) -> (BufReader<ChildStdout>, Input) {
        let output = self.child.stdout.take().expect("it is piped");
        (BufReader::new(output), Input(self.child.stdin.take()))
    }

    /// Where its complaints come from; to be called once.
    pub fn take_errors(&mut self) -> ChildStderr {
        self.child.stderr.take().expect("it is piped")
    }

    /// Waits for its end, and hastens it; says how it ended.
    pub fn end(mut self) -> String {
        let deadline = Instant::now() + END_TIME_MAX;
        self.group.terminate();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => {
                    // What it has started must not live on.
                    self.group.kill();
                    return match status.signal() {
                        Some(signal) => format!("ended by signal {signal}"),
                        None => format!("exit code {}", status.code().unwrap_or_default()),
                    };
                }
                Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK_EVERY),
                Ok(None) => {
                    self.group.kill();
                    return self.child.wait().map_or_else(|error| error.to_string(), |_| "killed".to_owned());
                }
                Err(error) => return error.to_string(),
            }
        }
    }
}

impl Group {
    /// Asks it to end.
    pub fn terminate(self) {
        self.signal(Signal::TERM);
    }

    /// Ends it.
    pub fn kill(self) {
        self.signal(Signal::KILL);
    }

    fn signal(self, signal: Signal) {
        // It may have ended already.
        let _ = self.0.map(|group| kill_process_group(group, signal));
    }
}

impl Input {
    /// Writes a line; waits while the program does not read.
    ///
    /// # Errors
    /// When the program has closed its input or ended.
    pub fn feed(&mut self, line: &[u8]) -> std::io::Result<()> {
        match &mut self.0 {
            Some(input) => input.write_all(line),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// Passes on what the program says to its operator.
pub fn log(errors: ChildStderr) {
    let (mut errors, mut line) = (BufReader::new(errors), Vec::new());
    while matches!(read_line(&mut errors, &mut line), Ok(true)) {
        let text = String::from_utf8_lossy(&line[..line.len().min(LOG_LINE_BYTES_MAX)]);
        tracing::info!(target: "sledge::plugin", "{}", text.trim_end());
    }
}
