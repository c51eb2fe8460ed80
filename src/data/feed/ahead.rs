//! Things made ahead by worker threads. Worker w of W makes every W-th and the consumer takes them in turn, so that the
//! number of workers changes nothing but the speed.

use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, JoinHandle};

/// How many each worker keeps ready at most.
const READY: usize = 3;
/// Bytes that all workers together may hold: in the making and ready.
const BOUND: usize = 512 << 20;

/// How many of `bytes` each worker may keep ready beside the one that it makes or, with none, waits to hand over.
fn ready(workers: usize, bytes: usize) -> usize {
    (BOUND / workers / bytes.max(1)).saturating_sub(1).min(READY)
}

/// A stream of things in the order of their numbers, made by other threads.
pub struct Ahead<T> {
    workers: Vec<Receiver<T>>,
    next: usize,
    /// None where it has been waited for.
    threads: Vec<Option<JoinHandle<()>>>,
}

impl<T: Send + 'static> Ahead<T> {
    /// Starts the workers. `maker` gives each a function from number to thing of some `bytes`, or to none after the last.
    pub fn start<M>(workers: usize, bytes: usize, maker: impl Fn() -> M) -> Ahead<T>
    where
        M: FnMut(usize) -> Option<T> + Send + 'static,
    {
        let start = |worker: usize| {
            let (sender, receiver) = sync_channel(ready(workers, bytes));
            let mut make = maker();
            let work = move || {
                let things = (worker..).step_by(workers).map_while(&mut make);
                // Until the last, or until nobody takes them any more.
                for thing in things {
                    if sender.send(thing).is_err() {
                        return;
                    }
                }
            };
            let thread = Builder::new().name(format!("data-{worker}")).spawn(work).expect("a thread can be started");
            (receiver, Some(thread))
        };
        let (workers, threads) = (0..workers).map(start).unzip();
        Ahead { workers, next: 0, threads }
    }
}

impl<T> Iterator for Ahead<T> {
    type Item = T;

    /// The next thing; waits for it if it is not ready. A worker's panic goes on here: what it did not make is no end of the
    /// stream.
    fn next(&mut self) -> Option<T> {
        let thing = self.workers[self.next].recv().ok();
        if thing.is_none()
            && let Some(thread) = self.threads[self.next].take()
            && let Err(panic) = thread.join()
        {
            resume_unwind(panic);
        }
        self.next = (self.next + 1) % self.workers.len();
        thing
    }
}

impl<T> Drop for Ahead<T> {
    /// Waits for the workers to end with what they are at: none may make tensors while the program ends.
    fn drop(&mut self) {
        self.workers.clear();
        for thread in self.threads.drain(..).flatten() {
            // A worker that panicked has said so.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_ready_is_bounded_in_number_and_in_bytes() {
        // ViT-B's micro-batch of 64 images, and one of 512.
        let (small, large) = (64 * 3 * 224 * 224 * 4, 512 * 3 * 224 * 224 * 4);
        assert_eq!([1, 3, 8, 30].map(|workers| ready(workers, small)), [3, 3, 0, 0]);
        assert_eq!([ready(1, large), ready(4, large), ready(4, 100)], [0, 0, 3]);
        for workers in 1..=13 {
            assert!(workers * (ready(workers, small) + 1) * small <= BOUND, "{workers}");
        }
    }

    #[test]
    fn a_worker_that_panics_is_no_end_of_the_stream() {
        let stopping = |number| if number == 5 { panic!("no memory for {number}") } else { Some(number) };
        let all = std::panic::catch_unwind(|| Ahead::start(2, 1, || stopping).collect::<Vec<usize>>());
        assert_eq!(all.unwrap_err().downcast_ref(), Some(&"no memory for 5".to_string()));
    }

    #[test]
    fn things_come_in_order_whatever_is_kept_ready() {
        for (workers, bytes) in [(1, 1), (3, 1), (3, BOUND)] {
            let things: Vec<usize> =
                Ahead::start(workers, bytes, || |number| (number < 100).then_some(number)).collect();
            assert_eq!(things, (0..100).collect::<Vec<_>>());
        }
    }
}
