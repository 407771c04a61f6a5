//! How many calls are being answered: what draining waits for.

use tokio::sync::watch;

/// The number of calls being answered. Streams of health watchers and of reflection are not among them, since they
/// end when their clients please.
#[derive(Debug)]
pub(super) struct Calls(watch::Sender<usize>);

/// A call being answered, until dropped.
pub(super) struct Call<'a>(&'a Calls);

impl Calls {
    pub(super) fn new() -> Calls {
        Calls(watch::Sender::new(0))
    }

    pub(super) fn enter(&self) -> Call<'_> {
        self.0.send_modify(|n| *n += 1);
        Call(self)
    }

    /// Waits until no call is being answered.
    pub(super) async fn none(&self) {
        // The sender lives as long as this future.
        let _ = self.0.subscribe().wait_for(|n| *n == 0).await;
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|n| *n -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn draining_waits_for_every_call() {
        let calls = Calls::new();
        calls.none().await;
        let (first, second) = (calls.enter(), calls.enter());
        drop(first);
        let waiting = calls.none();
        tokio::pin!(waiting);
        assert!(futures_are_pending(waiting.as_mut()).await);
        drop(second);
        waiting.await;
    }

    async fn futures_are_pending(mut future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
        std::future::poll_fn(|context| std::task::Poll::Ready(future.as_mut().poll(context).is_pending()))
            .await
    }
}
