//! The listening socket on its way from one process to the next, so that a new version of the relay takes over without
//! refusing a connection: whoever connects meanwhile waits in the system's queue until the new process accepts.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// Bytes of the line that comes with the socket.
const LINE_BYTES_MAX: usize = 4 * 1024;

/// Sends `line` and a copy of `listener` beside it. Never waits: `WouldBlock` where the socket has no room.
///
/// # Errors
/// What the system says.
pub fn send(socket: impl AsFd, line: &[u8], listener: &TcpListener) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let sockets = [listener.as_fd()];
    beside.push(SendAncillaryMessage::ScmRights(&sockets));
    let sent = sendmsg(socket, &[IoSlice::new(line)], &mut beside, SendFlags::NOSIGNAL)?;
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Reads what [`send`] sent: the line, and the socket if there was one.
///
/// # Errors
/// What the system says, such as a read time-out.
pub fn receive(socket: &UnixStream) -> io::Result<(Vec<u8>, Option<TcpListener>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut line = vec![0; LINE_BYTES_MAX];
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut line)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
    line.truncate(received.bytes);
    let listener = beside.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next().map(TcpListener::from),
        _ => None,
    });
    Ok((line, listener))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{Read, Write};

    use super::*;

    /// The copy accepts who connected before it arrived, also when the original is closed.
    #[test]
    fn a_listener_survives_its_first_owner() {
        let (old, new) = UnixStream::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let mut newcomer = std::net::TcpStream::connect(addr).unwrap();
        send(&old, b"\"listener\"\n", &listener).unwrap();
        drop(listener);
        let (line, passed) = receive(&new).unwrap();
        assert_eq!(line, b"\"listener\"\n");
        let (mut accepted, _) = passed.unwrap().accept().unwrap();
        newcomer.write_all(b"x").unwrap();
        accepted.read_exact(&mut [0]).unwrap();
    }

    /// A line alone, or nothing at all, brings no socket.
    #[test]
    fn a_line_may_come_alone() {
        let (mut old, new) = UnixStream::pair().unwrap();
        old.write_all(b"x\n").unwrap();
        assert!(matches!(receive(&new), Ok((line, None)) if line == b"x\n"));
        drop(old);
        assert!(matches!(receive(&new), Ok((line, None)) if line.is_empty()));
    }
}
