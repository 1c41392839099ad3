//! The common configuration of a virtio device on PCI (virtio 1.2, 4.1.4.3): features, status and queues.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::QueueT;

use super::guest::{Broken, VirtQueue, Watched};

/// Offsets of the registers.
const DEVICE_SELECT: usize = 0x00;
const DEVICE_FEATURES: usize = 0x04;
const DRIVER_SELECT: usize = 0x08;
const DRIVER_FEATURES: usize = 0x0c;
const CONFIG_VECTOR: usize = 0x10;
const QUEUES: usize = 0x12;
const STATUS: usize = 0x14;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY: usize = 0x1e;
const QUEUE_DESCRIPTORS: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;
/// The size of the structure.
pub(super) const BYTES: usize = 0x40;

/// The vector of what does not interrupt.
pub(super) const NO_VECTOR: u16 = 0xffff;

const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// The features of the transport and of its queues. With ACCESS_PLATFORM a driver gives the device addresses that the
/// platform lets devices use; in a confidential guest that is shared memory.
const OFFERED: u64 = VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The effect of a write, beside the register's value.
#[derive(Debug)]
pub(super) enum Effect {
    None,
    /// The driver has reset the device.
    Reset,
    /// The device cannot go on.
    Broken(Broken),
}

pub(super) struct Registers {
    /// The features that the device offers.
    offered: u64,
    /// The number of interrupt vectors.
    vectors: usize,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    status: u8,
    pub(super) config_vector: u16,
    queue_select: u16,
    pub(super) queues: Vec<VirtQueue>,
}

impl Registers {
    pub(super) fn new(device_features: u64, queues: u16, vectors: usize) -> Self {
        let queue = |_| VirtQueue::new(NO_VECTOR);
        Self {
            offered: OFFERED | device_features,
            vectors,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            status: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: (0..queues).map(queue).collect(),
        }
    }

    fn reset(&mut self) {
        let queues = self.queues.len() as u16;
        *self = Self::new(self.offered, queues, self.vectors);
    }

    /// True if the driver has set the device up, and the device is well.
    pub(super) const fn is_live(&self) -> bool {
        self.status & (DRIVER_OK | FEATURES_OK | NEEDS_RESET) == DRIVER_OK | FEATURES_OK
    }

    /// The device cannot go on; the driver finds it out from the status.
    pub(super) const fn fail(&mut self) {
        self.status |= NEEDS_RESET;
    }

    /// Reads registers, in any width.
    pub(super) fn read(&self, at: usize, data: &mut [u8]) {
        let bytes = self.bytes();
        for (byte, at) in data.iter_mut().zip(at..) {
            *byte = bytes.get(at).copied().unwrap_or(0);
        }
    }

    fn bytes(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(DEVICE_SELECT, &self.device_select.to_le_bytes());
        put(
            DEVICE_FEATURES,
            &half(self.offered, self.device_select).to_le_bytes(),
        );
        put(DRIVER_SELECT, &self.driver_select.to_le_bytes());
        put(
            DRIVER_FEATURES,
            &half(self.accepted, self.driver_select).to_le_bytes(),
        );
        put(CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        put(QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(STATUS, &[self.status]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(QUEUE_SIZE, &queue.ring.size().to_le_bytes());
            put(QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.ring.ready()).to_le_bytes());
            put(QUEUE_NOTIFY, &self.queue_select.to_le_bytes());
            put(QUEUE_DESCRIPTORS, &queue.ring.desc_table().to_le_bytes());
            put(QUEUE_DRIVER, &queue.ring.avail_ring().to_le_bytes());
            put(QUEUE_DEVICE, &queue.ring.used_ring().to_le_bytes());
        }
        bytes
    }

    /// Writes a register, whole; the halves of those of 64 bits too. Other writes vanish.
    pub(super) fn write(&mut self, at: usize, data: &[u8], memory: &Watched<'_>) -> Effect {
        match *data {
            [byte] if at == STATUS => return self.set_status(byte),
            [low, high] => return self.write_word(at, u16::from_le_bytes([low, high]), memory),
            [a, b, c, d] => self.write_dword(at, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if at >= QUEUE_DESCRIPTORS => {
                self.write_dword(at, u32::from_le_bytes([a, b, c, d]));
                self.write_dword(at + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Effect::None
    }

    fn set_status(&mut self, status: u8) -> Effect {
        if status == 0 {
            self.reset();
            return Effect::Reset;
        }
        let acceptable = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        let refused = if acceptable { 0 } else { FEATURES_OK };
        // Bits are taken back by a reset only.
        self.status |= status & !(refused | NEEDS_RESET);
        Effect::None
    }

    fn write_word(&mut self, at: usize, value: u16, memory: &Watched<'_>) -> Effect {
        let vector = match usize::from(value) < self.vectors {
            true => value,
            false => NO_VECTOR,
        };
        match at {
            CONFIG_VECTOR => self.config_vector = vector,
            QUEUE_SELECT => self.queue_select = value,
            _ => {}
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return Effect::None;
        };
        match at {
            QUEUE_VECTOR => queue.vector = vector,
            QUEUE_SIZE if !queue.ring.ready() => queue.ring.set_size(value),
            QUEUE_ENABLE if value == 1 && !queue.ring.ready() => {
                return queue
                    .enable(memory)
                    .map_or_else(Effect::Broken, |()| Effect::None);
            }
            _ => {}
        }
        Effect::None
    }

    fn write_dword(&mut self, at: usize, value: u32) {
        match at {
            DEVICE_SELECT => self.device_select = value,
            DRIVER_SELECT => self.driver_select = value,
            DRIVER_FEATURES if self.status & FEATURES_OK == 0 && self.driver_select < 2 => {
                let shift = 32 * self.driver_select;
                self.accepted &= !(0xffff_ffff << shift);
                self.accepted |= u64::from(value) << shift;
            }
            QUEUE_DESCRIPTORS.. => self.set_address(at, value),
            _ => {}
        }
    }

    /// Sets half of an address of the selected queue, which is not in use yet.
    fn set_address(&mut self, at: usize, value: u32) {
        let queue = self.queues.get_mut(usize::from(self.queue_select));
        let Some(queue) = queue.filter(|queue| !queue.ring.ready()) else {
            return;
        };
        let (low, high) = match at % 8 {
            0 => (Some(value), None),
            4 => (None, Some(value)),
            _ => return,
        };
        match at & !7 {
            QUEUE_DESCRIPTORS => queue.ring.set_desc_table_address(low, high),
            QUEUE_DRIVER => queue.ring.set_avail_ring_address(low, high),
            QUEUE_DEVICE => queue.ring.set_used_ring_address(low, high),
            _ => {}
        }
    }
}

/// Half of a set of features, as the select register names it.
const fn half(features: u64, which: u32) -> u32 {
    match which {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
