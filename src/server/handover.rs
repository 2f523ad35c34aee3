//! The listening sockets on their way from one process to the next, so that a new version of the relay takes over without
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

/// Bytes of the line that comes with the sockets.
const LINE_BYTES_MAX: usize = 4 * 1024;

/// The plain one and the encrypted one.
const SOCKETS_MAX: usize = 2;

/// Sends `line` and copies of up to `SOCKETS_MAX` `listeners` beside it. Never waits: `WouldBlock` where the socket has no
/// room.
///
/// # Errors
/// What the system says.
pub fn send(socket: impl AsFd, line: &[u8], listeners: &[TcpListener]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let sockets: Vec<_> = listeners.iter().take(SOCKETS_MAX).map(AsFd::as_fd).collect();
    beside.push(SendAncillaryMessage::ScmRights(&sockets));
    let sent = sendmsg(socket, &[IoSlice::new(line)], &mut beside, SendFlags::NOSIGNAL)?;
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Reads what [`send`] sent: the line, and the sockets in their order.
///
/// # Errors
/// What the system says, such as a read time-out.
pub fn receive(socket: &UnixStream) -> io::Result<(Vec<u8>, Vec<TcpListener>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut line = vec![0; LINE_BYTES_MAX];
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut line)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
    line.truncate(received.bytes);
    let mut listeners = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(sockets) = message {
            listeners.extend(sockets.map(TcpListener::from));
        }
    }
    Ok((line, listeners))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{Read, Write};

    use super::*;

    /// The copies accept who connected before they arrived, also when the originals are closed.
    #[test]
    fn listeners_survive_their_first_owner() {
        for count in 1..=SOCKETS_MAX {
            let (old, new) = UnixStream::pair().unwrap();
            let listeners: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
            let addrs: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
            let newcomers: Vec<_> = addrs.iter().map(|addr| std::net::TcpStream::connect(addr).unwrap()).collect();
            send(&old, b"\"listener\"\n", &listeners).unwrap();
            drop(listeners);
            let (line, passed) = receive(&new).unwrap();
            assert_eq!(line, b"\"listener\"\n");
            let passed_addrs: Vec<_> = passed.iter().map(|listener| listener.local_addr().unwrap()).collect();
            assert_eq!(passed_addrs, addrs);
            for (listener, mut newcomer) in passed.iter().zip(newcomers) {
                let (mut accepted, _) = listener.accept().unwrap();
                newcomer.write_all(b"x").unwrap();
                accepted.read_exact(&mut [0]).unwrap();
            }
        }
    }

    /// A line alone, or nothing at all, brings no socket.
    #[test]
    fn a_line_may_come_alone() {
        let (mut old, new) = UnixStream::pair().unwrap();
        old.write_all(b"x\n").unwrap();
        assert!(matches!(receive(&new), Ok((line, none)) if line == b"x\n" && none.is_empty()));
        drop(old);
        assert!(matches!(receive(&new), Ok((line, none)) if line.is_empty() && none.is_empty()));
    }
}
