//! A stream of items that worker threads make ahead of the consumer. With W workers, worker w makes the items w, w + W, w + 2W, and
//! so on. The consumer takes one item from each worker in turn. So the number of workers changes the speed and the memory, but not
//! the items.

use crate::thread;
use anyhow::Result;
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

/// The most items that a worker keeps ready.
const MOST_READY: usize = 3;
/// The most bytes that the items of all workers may take, both the items that are ready and the items that are being made. But each
/// worker may always make one item, even if one item per worker exceeds this limit.
const MOST_BYTES: usize = 512 << 20;

/// How many items of `bytes` bytes each worker may keep ready, apart from the item that it is making. If the number is 0, a worker
/// makes the next item only after the consumer has taken the previous item.
fn ready(workers: usize, bytes: usize) -> usize {
    (MOST_BYTES / workers / bytes.max(1)).saturating_sub(1).min(MOST_READY)
}

/// The most items of `bytes` bytes that each of `workers` workers holds: the ready items and the item that it is making.
pub fn held_by_worker(workers: usize, bytes: usize) -> usize {
    ready(workers, bytes) + 1
}

/// The stream of items, in order.
pub struct Ahead<T> {
    workers: Vec<Receiver<T>>,
    /// The worker whose item the consumer takes next.
    next: usize,
    /// The workers' threads; none for a thread that was joined.
    threads: Vec<Option<JoinHandle<()>>>,
}

impl<T: Send + 'static> Ahead<T> {
    /// Starts the workers. `maker` makes one function for each worker. This function takes the number of an item and makes that
    /// item, or returns none after the last item. An item takes about `bytes` bytes.
    ///
    /// # Errors
    /// A usage error if a thread cannot be started.
    pub fn start<M>(workers: usize, bytes: usize, maker: impl Fn() -> M) -> Result<Ahead<T>>
    where
        M: FnMut(usize) -> Option<T> + Send + 'static,
    {
        let start = |worker: usize| {
            let (sender, receiver) = sync_channel(ready(workers, bytes));
            let mut make = maker();
            let work = move || {
                let items = (worker..).step_by(workers).map_while(&mut make);
                // The worker ends after the last item, or when the stream is dropped.
                for item in items {
                    if sender.send(item).is_err() {
                        return;
                    }
                }
            };
            let thread = thread::start(&format!("data-{worker}"), work)?;
            Ok((receiver, Some(thread)))
        };
        let started: Result<Vec<_>> = (0..workers).map(start).collect();
        let (workers, threads) = started?.into_iter().unzip();
        Ok(Ahead { workers, next: 0, threads })
    }
}

impl<T> Iterator for Ahead<T> {
    type Item = T;

    /// Waits for the next item. Returns none after the last item. If the item's worker has panicked, the panic is resumed in the
    /// calling thread.
    fn next(&mut self) -> Option<T> {
        let item = self.workers[self.next].recv().ok();
        if item.is_none()
            && let Some(thread) = self.threads[self.next].take()
            && let Err(panic) = thread.join()
        {
            resume_unwind(panic);
        }
        self.next = (self.next + 1) % self.workers.len();
        item
    }
}

impl<T> Drop for Ahead<T> {
    /// Waits for the workers to end, because no thread may make tensors while the program ends.
    fn drop(&mut self) {
        self.workers.clear();
        for thread in self.threads.drain(..).flatten() {
            // A worker's panic was printed when it happened.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_items_are_bounded_in_number_and_in_bytes() {
        // The bytes of 64 images and of 512 images of ViT-B (3 × 224 × 224, fp32).
        let (of_64, of_512) = (64 * 3 * 224 * 224 * 4, 512 * 3 * 224 * 224 * 4);
        assert_eq!([1, 3, 8, 30].map(|workers| ready(workers, of_64)), [3, 3, 0, 0]);
        assert_eq!([ready(1, of_512), ready(4, of_512), ready(4, 100)], [0, 0, 3]);
        for workers in 1..=13 {
            assert!(workers * (ready(workers, of_64) + 1) * of_64 <= MOST_BYTES, "{workers}");
        }
    }

    #[test]
    fn the_panic_of_a_worker_does_not_look_like_the_end_of_the_stream() {
        let stopping = |number| if number == 5 { panic!("no memory for {number}") } else { Some(number) };
        let all = std::panic::catch_unwind(|| Ahead::start(2, 1, || stopping).unwrap().collect::<Vec<usize>>());
        assert_eq!(all.unwrap_err().downcast_ref(), Some(&"no memory for 5".to_string()));
    }

    #[test]
    fn items_come_in_order_whatever_number_is_kept_ready() {
        for (workers, bytes) in [(1, 1), (3, 1), (3, MOST_BYTES)] {
            let items: Vec<usize> =
                Ahead::start(workers, bytes, || |number| (number < 100).then_some(number)).unwrap().collect();
            assert_eq!(items, (0..100).collect::<Vec<_>>());
        }
    }
}
