//! SIGINT and SIGTERM: the first asks to stop, the second stops at once.

use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::error::Error;

/// Whether somebody asked this process to stop. Clones tell the same.
#[derive(Clone, Debug)]
pub struct Interrupt(watch::Receiver<bool>);

impl Interrupt {
    /// From now on signals do not end the process but are told here; the second one ends it with code 1. Nothing that
    /// the store acknowledged depends on a clean end.
    ///
    /// # Errors
    /// When the system gives no thread or no signal handler.
    pub fn watch() -> Result<Interrupt, Error> {
        let cannot = |error| Error::Failed(format!("cannot listen for signals: {error}"));
        let runtime = Builder::new_current_thread().enable_io().build().map_err(cannot)?;
        let entered = runtime.enter();
        let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
        drop(entered);
        let (tell, told) = watch::channel(false);
        let listen = async move {
            for _ in 0..2 {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if tell.send_replace(true) {
                    std::process::exit(1);
                }
            }
        };
        let thread = std::thread::Builder::new().name("signals".to_owned());
        thread.spawn(move || runtime.block_on(listen)).map_err(cannot)?;
        Ok(Interrupt(told))
    }

    /// Whether a signal came.
    pub fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once a signal came.
    pub async fn wait(&mut self) {
        // Ends early only if the thread above has ended, which it does by ending the process.
        let _ = self.0.wait_for(|set| *set).await;
    }
}

#[cfg(test)]
impl Interrupt {
    /// One that tests set themselves.
    pub fn by_hand() -> (watch::Sender<bool>, Interrupt) {
        let (tell, told) = watch::channel(false);
        (tell, Interrupt(told))
    }
}
