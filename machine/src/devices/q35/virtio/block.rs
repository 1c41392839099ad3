//! The virtio block device (virtio 1.2, 5.2), over a disk image. Requests are done when the driver notifies, by the vCPU that
//! notifies, so a run on the software platform is the same each time.

use std::io::{self, Read, Write};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::Device;
use super::disk::{Disk, SECTOR};
use super::guest::{Broken, Chain, QUEUE_MAX, Refused, VirtQueue, Watched};

/// The configuration structure up to the topology, which is not offered, and its fields.
const CONFIG_BYTES: usize = 0x20;
const CAPACITY: usize = 0;
const SEGMENTS_MAX: usize = 12;
const BLOCK_SIZE: usize = 20;

/// Bytes that are copied at once: the length of a request is the guest's.
const PIECE: usize = 64 << 10;

pub(super) struct Block {
    disk: Disk,
    config: [u8; CONFIG_BYTES],
    buffer: Vec<u8>,
}

/// The answer to a request that is not done.
enum Undone {
    Unsupported,
    Outside,
    ReadOnly,
    Failed(io::Error),
}

impl From<io::Error> for Undone {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl Block {
    pub(super) fn new(disk: Disk) -> Self {
        let mut config = [0; CONFIG_BYTES];
        config[CAPACITY..CAPACITY + 8].copy_from_slice(&disk.sectors.to_le_bytes());
        // Beside header and status.
        let segments = u32::from(QUEUE_MAX) - 2;
        config[SEGMENTS_MAX..SEGMENTS_MAX + 4].copy_from_slice(&segments.to_le_bytes());
        config[BLOCK_SIZE..BLOCK_SIZE + 4].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        Self {
            disk,
            config,
            buffer: vec![0; PIECE],
        }
    }

    /// Does a request. Returns the number of bytes written to the guest.
    fn serve(&mut self, chain: &mut Chain<'_, '_>) -> Result<u32, Broken> {
        let short = Broken::Short { head: chain.head };
        let mut header = [0; 16];
        let room = chain.writer.available_bytes().checked_sub(1);
        let (Some(room), Ok(())) = (room, chain.reader.read_exact(&mut header)) else {
            return Err(short);
        };
        let mut status = chain.writer.split_at(room).map_err(|_| short)?;
        let [kind, _, low, high] = header.as_chunks::<4>().0 else {
            unreachable!("the header has four words");
        };
        let sector =
            u64::from(u32::from_le_bytes(*high)) << 32 | u64::from(u32::from_le_bytes(*low));
        let done = match u32::from_le_bytes(*kind) {
            VIRTIO_BLK_T_IN => self.read(sector, chain),
            VIRTIO_BLK_T_OUT => self.write(sector, chain),
            VIRTIO_BLK_T_FLUSH => self.flush(),
            VIRTIO_BLK_T_GET_ID => self.identify(chain),
            _ => Err(Undone::Unsupported),
        };
        let answer = match done {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(undone) => self.refuse(sector, &undone),
        };
        // There is room for it.
        let _ = status.write_all(&[answer as u8]);
        Ok(u32::try_from(chain.writer.bytes_written() + 1).unwrap_or(u32::MAX))
    }

    /// The status of a request that is not done.
    fn refuse(&self, sector: u64, undone: &Undone) -> u32 {
        self.disk.count(|counts| counts.failed += 1);
        let path = self.disk.path().display();
        match undone {
            Undone::Unsupported => VIRTIO_BLK_S_UNSUPP,
            Undone::Outside => {
                tracing::warn!(%path, sector, "a request is not for sectors of the disk");
                VIRTIO_BLK_S_IOERR
            }
            Undone::ReadOnly => {
                tracing::warn!(%path, sector, "a request is to write a read-only disk");
                VIRTIO_BLK_S_IOERR
            }
            Undone::Failed(error) => {
                tracing::error!(%path, sector, %error, "a request fails");
                VIRTIO_BLK_S_IOERR
            }
        }
    }

    fn read(&mut self, sector: u64, chain: &mut Chain<'_, '_>) -> Result<(), Undone> {
        let bytes = chain.writer.available_bytes();
        let at = self
            .disk
            .place(sector, bytes as u64)
            .ok_or(Undone::Outside)?;
        for done in (0..bytes).step_by(PIECE) {
            let piece = &mut self.buffer[..PIECE.min(bytes - done)];
            self.disk.read(at + done as u64, piece)?;
            chain.writer.write_all(piece)?;
        }
        self.disk.count(|counts| {
            counts.reads += 1;
            counts.bytes_read += bytes as u64;
        });
        Ok(())
    }

    fn write(&mut self, sector: u64, chain: &mut Chain<'_, '_>) -> Result<(), Undone> {
        let bytes = chain.reader.available_bytes();
        let at = self
            .disk
            .place(sector, bytes as u64)
            .ok_or(Undone::Outside)?;
        if self.disk.read_only {
            return Err(Undone::ReadOnly);
        }
        for done in (0..bytes).step_by(PIECE) {
            let piece = &mut self.buffer[..PIECE.min(bytes - done)];
            chain.reader.read_exact(piece)?;
            self.disk.write(at + done as u64, piece)?;
        }
        self.disk.count(|counts| {
            counts.writes += 1;
            counts.bytes_written += bytes as u64;
        });
        Ok(())
    }

    fn flush(&self) -> Result<(), Undone> {
        self.disk.flush()?;
        self.disk.count(|counts| counts.flushes += 1);
        Ok(())
    }

    /// Tells the disk's name: the beginning of the file's.
    fn identify(&self, chain: &mut Chain<'_, '_>) -> Result<(), Undone> {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let name = self.disk.path().file_name().unwrap_or_default();
        let name = name.as_encoded_bytes();
        id.iter_mut().zip(name).for_each(|(to, byte)| *to = *byte);
        let room = chain.writer.available_bytes().min(id.len());
        chain.writer.write_all(&id[..room])?;
        Ok(())
    }
}

impl Device for Block {
    const ID: u16 = VIRTIO_ID_BLOCK as u16;
    /// Mass storage of another kind.
    const CLASS: u32 = 0x01_8000;
    const QUEUES: u16 = 1;

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
        ];
        let read_only = self.disk.read_only.then_some(VIRTIO_BLK_F_RO);
        let bits = always.into_iter().chain(read_only);
        bits.fold(0, |features, bit| features | 1 << bit)
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn notified(
        &mut self,
        _: usize,
        queue: &mut VirtQueue,
        memory: &Watched<'_>,
    ) -> Result<(), Broken> {
        queue.each(memory, |chain| self.serve(chain))
    }

    fn broken(&mut self, why: &Broken) {
        self.disk.count(|counts| {
            counts.resets_needed += 1;
            if let Broken::Memory(Refused::Private(_)) = why {
                counts.private += 1;
            }
        });
    }
}
