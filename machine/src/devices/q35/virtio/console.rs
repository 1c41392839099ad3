//! The virtio console (virtio 1.2, 5.3) with one port: what the driver sends is printed by the vCPU that notifies, and what is
//! typed waits until the driver has given room for it.

use std::collections::VecDeque;
use std::io::{Read, Write};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::Device;
use super::guest::{Broken, Chain, VirtQueue, Watched};
use crate::ConsoleSink;

/// The queues of the port.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The configuration structure: size of the window, number of ports, a place to write without a queue. None of it is offered.
const CONFIG: [u8; 12] = [0; 12];
/// Bytes that are typed and wait, at the most.
const TYPED_MAX: usize = 4096;
/// Bytes that one chain prints, at the most: its length is the guest's.
const CHAIN_MAX: usize = 1 << 20;
/// Bytes that are copied at once.
const PIECE: usize = 4096;

pub(super) struct Console {
    output: ConsoleSink,
    /// What was typed, and has not reached the driver yet.
    typed: VecDeque<u8>,
}

impl Console {
    pub(super) const fn new(output: ConsoleSink) -> Self {
        Self {
            output,
            typed: VecDeque::new(),
        }
    }

    /// Prints a chain that the driver has sent.
    fn print(&self, chain: &mut Chain<'_, '_>) -> Result<u32, Broken> {
        let head = chain.head;
        let mut left = chain.reader.available_bytes();
        if left > CHAIN_MAX {
            return Err(Broken::Long { head, bytes: left });
        }
        let mut piece = [0; PIECE];
        while left != 0 {
            let piece = &mut piece[..left.min(PIECE)];
            if chain.reader.read_exact(piece).is_err() {
                return Err(Broken::Chain { head });
            }
            self.output.print(piece);
            left -= piece.len();
        }
        Ok(0)
    }

    /// Hands out what was typed, as far as the driver has given room.
    fn receive(&mut self, queue: &mut VirtQueue, memory: &Watched<'_>) -> Result<(), Broken> {
        while !self.typed.is_empty() {
            let Some(mut chain) = queue.take(memory)? else {
                break;
            };
            let head = chain.head;
            let room = chain.writer.available_bytes().min(self.typed.len());
            let typed: Vec<u8> = self.typed.drain(..room).collect();
            if typed.is_empty() || chain.writer.write_all(&typed).is_err() {
                return Err(Broken::Short { head });
            }
            queue.give_back(memory, head, typed.len() as u32)?;
        }
        Ok(())
    }
}

impl Device for Console {
    const ID: u16 = VIRTIO_ID_CONSOLE as u16;
    /// Simple communication of another kind.
    const CLASS: u32 = 0x07_8000;
    const QUEUES: u16 = 2;
    const INPUT: Option<usize> = Some(RECEIVE);

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &CONFIG
    }

    fn notified(
        &mut self,
        number: usize,
        queue: &mut VirtQueue,
        memory: &Watched<'_>,
    ) -> Result<(), Broken> {
        match number {
            RECEIVE => self.receive(queue, memory),
            TRANSMIT => queue.each(memory, |chain| self.print(chain)),
            _ => Ok(()),
        }
    }

    fn type_in(&mut self, input: &[u8]) -> usize {
        let room = TYPED_MAX.saturating_sub(self.typed.len()).min(input.len());
        self.typed.extend(&input[..room]);
        room
    }

    fn broken(&mut self, _: &Broken) {}
}
