//! Things made ahead by worker threads. Worker w of W makes every W-th and the consumer takes them in turn, so that the
//! number of workers changes nothing but the speed.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, JoinHandle};

/// How many each worker keeps ready.
const READY: usize = 3;

/// A stream of things in the order of their numbers, made by other threads.
pub struct Ahead<T> {
    workers: Vec<Receiver<T>>,
    next: usize,
    threads: Vec<JoinHandle<()>>,
}

impl<T: Send + 'static> Ahead<T> {
    /// Starts the workers. `maker` gives each a function from number to thing, or to none after the last.
    pub fn start<M>(workers: usize, maker: impl Fn() -> M) -> Ahead<T>
    where
        M: FnMut(usize) -> Option<T> + Send + 'static,
    {
        let start = |worker: usize| {
            let (sender, receiver) = sync_channel(READY);
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
            (receiver, thread)
        };
        let (workers, threads) = (0..workers).map(start).unzip();
        Ahead { workers, next: 0, threads }
    }
}

impl<T> Iterator for Ahead<T> {
    type Item = T;

    /// The next thing; waits for it if it is not ready.
    fn next(&mut self) -> Option<T> {
        let thing = self.workers[self.next].recv().ok();
        self.next = (self.next + 1) % self.workers.len();
        thing
    }
}

impl<T> Drop for Ahead<T> {
    /// Waits for the workers to end with what they are at: none may make tensors while the program ends.
    fn drop(&mut self) {
        self.workers.clear();
        for thread in self.threads.drain(..) {
            // A worker that panicked has said so.
            let _ = thread.join();
        }
    }
}
