//! From asynchronous to blocking: a [`Store`](crate::store::Store) is called on plain threads.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use tokio::runtime::Handle;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs `future` on this thread to its end; sockets and timers are looked after by the runtime behind `handle`. Unlike
/// tokio's own, it may also be called on a thread of another runtime, which it then holds up for that long.
pub(super) fn block_on<F: Future>(handle: &Handle, future: F) -> F::Output {
    let _entered = handle.enter();
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Timers run, on a plain thread and inside another runtime.
    #[test]
    fn it_waits_anywhere() {
        let builder = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (ours, other) = (builder(), builder());
        let nap = || async {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            7
        };
        assert_eq!(block_on(ours.handle(), nap()), 7);
        assert_eq!(other.block_on(async { block_on(ours.handle(), nap()) }), 7);
    }
}
