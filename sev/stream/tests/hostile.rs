//! The stream against people and machines that do not keep to it: a man in the middle, a sender that
//! leaves parts out or never ends, and peers that are silent, slow or send garbage.

extern crate kvm_ops_core as kvm_ops;

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use embedded_io::{ErrorKind, ErrorType, Read, Write};
use kvm_ops::{Gfn, Result, Tech, VcpuId};
use kvm_ops_sev_stream::*;

const FRAMES: u64 = 6;
const VCPUS: u32 = 2;

/// A guest without firmware: its packets are plain.
#[derive(Default)]
struct Guest {
    pages: [u8; FRAMES as usize],
    vcpus: Vec<u8>,
    finished: bool,
    owned: bool,
}

impl Guest {
    fn running() -> Self {
        Self {
            pages: [1, 2, 3, 4, 5, 6],
            vcpus: vec![7, 8],
            ..Self::default()
        }
    }
}

fn shape() -> Shape {
    Shape {
        tech: Tech::Sev,
        policy: 0,
        vcpus: VCPUS,
        layout: Layout::new([(Gfn::new(0), FRAMES)]).unwrap(),
    }
}

impl MigrateSource for Guest {
    fn shape(&self) -> Result<Shape> {
        Ok(shape())
    }
    fn send_start(&mut self, _: &PlatformCerts) -> Result<SessionStart> {
        Ok(SessionStart::default())
    }
    fn frame(&mut self, gfn: Gfn, packet: &mut Packet) -> Result<FrameContent> {
        packet.data = [self.pages[gfn.get() as usize]; PAGE];
        Ok(FrameContent::Private)
    }
    fn vcpu(&mut self, vcpu: VcpuId, packet: &mut Packet) -> Result<VcpuContent> {
        packet.data[0] = self.vcpus[vcpu.0 as usize];
        Ok(VcpuContent::Clear(1))
    }
    fn take_dirty(&mut self, _: &mut FrameSet) -> Result<bool> {
        Ok(true)
    }
    fn stop(&mut self) -> Result<()> {
        Ok(())
    }
    fn go_on(&mut self) {}
    fn send_finish(&mut self) -> Result<()> {
        Ok(())
    }
    fn send_cancel(&mut self) -> Result<()> {
        Ok(())
    }
}

impl MigrateTarget for Guest {
    fn certs(&mut self) -> Result<PlatformCerts> {
        Ok(PlatformCerts::default())
    }
    fn accept(&mut self, _: &Shape) -> Result<()> {
        Ok(())
    }
    fn receive_start(&mut self, _: &SessionStart) -> Result<()> {
        self.vcpus = vec![0; VCPUS as usize];
        Ok(())
    }
    fn receive_private(&mut self, gfn: Gfn, packet: &Packet) -> Result<()> {
        self.pages[gfn.get() as usize] = packet.data[0];
        Ok(())
    }
    fn receive_shared(&mut self, _: Gfn, _: Option<&[u8; PAGE]>) -> Result<()> {
        unreachable!("every page is private")
    }
    fn receive_absent(&mut self, gfn: Gfn) -> Result<()> {
        self.pages[gfn.get() as usize] = 0;
        Ok(())
    }
    fn receive_vcpu(&mut self, vcpu: VcpuId, _: VcpuContent, packet: &Packet) -> Result<()> {
        self.vcpus[vcpu.0 as usize] = packet.data[0];
        Ok(())
    }
    fn receive_finish(&mut self) -> Result<()> {
        self.finished = true;
        Ok(())
    }
    fn own(&mut self) {
        self.owned = true;
    }
    fn abandon(&mut self) -> Result<()> {
        *self = Self::default();
        Ok(())
    }
}

struct Link(UnixStream);

impl ErrorType for Link {
    type Error = ErrorKind;
}

impl Read for Link {
    fn read(&mut self, out: &mut [u8]) -> std::result::Result<usize, ErrorKind> {
        // A socket whose read timeout is over.
        match self.0.read(out) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                Err(ErrorKind::TimedOut)
            }
            other => other.map_err(|_| ErrorKind::ConnectionReset),
        }
    }
}

impl Write for Link {
    fn write(&mut self, data: &[u8]) -> std::result::Result<usize, ErrorKind> {
        self.0.write(data).map_err(|_| ErrorKind::BrokenPipe)
    }
    fn flush(&mut self) -> std::result::Result<(), ErrorKind> {
        Ok(())
    }
}

const KEY: StreamKey = StreamKey::new([9; 32]);

fn sender(keyed: bool) -> Sender<Guest> {
    let mut random = |out: &mut [u8]| {
        out.fill(3);
        Ok(())
    };
    let limits = SendLimits::default();
    let sender = Sender::new(Guest::running(), limits, &mut random);
    let Ok(sender) = sender else { unreachable!() };
    if keyed { sender.with_key(KEY) } else { sender }
}

fn receiver(keyed: bool) -> Receiver<Guest> {
    let receiver = Receiver::new(Guest::default());
    if keyed {
        receiver.with_key(KEY, [5; 16])
    } else {
        receiver
    }
}

/// One frame as bytes, with its kind.
type Raw = (u8, Vec<u8>);

fn read_raw(stream: &mut UnixStream) -> Option<Raw> {
    let mut frame = vec![0; 36];
    stream.read_exact(&mut frame).ok()?;
    let len = u32::from_le_bytes(frame[16..20].try_into().unwrap());
    frame.resize(36 + len as usize, 0);
    stream.read_exact(&mut frame[36..]).ok()?;
    Some((frame[5], frame))
}

/// Makes the tag right again as far as one can without the key.
fn with_checksum(mut frame: Vec<u8>) -> Vec<u8> {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&frame[..20]);
    sum.update(&frame[36..]);
    frame[20..36].fill(0);
    frame[20..24].copy_from_slice(&sum.finalize().to_le_bytes());
    frame
}

const PRIVATE: u8 = 6;

/// Runs a migration with somebody on the link who sees each frame for the target and returns the
/// frames that go on in its place.
fn through(
    tx: &mut Sender<Guest>,
    rx: &mut Receiver<Guest>,
    mut meddle: impl FnMut(Raw) -> Vec<Vec<u8>> + Send,
) -> [std::result::Result<Progress, MigrateError>; 2] {
    let ((a, mut b), (mut c, d)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    thread::scope(|scope| {
        let (mut back_in, mut back_out) = (c.try_clone().unwrap(), b.try_clone().unwrap());
        scope.spawn(move || {
            while let Some(frame) = read_raw(&mut b) {
                for frame in meddle(frame) {
                    let _ = c.write_all(&frame);
                }
            }
            let _ = c.shutdown(std::net::Shutdown::Both);
        });
        scope.spawn(move || {
            while let Some((_, frame)) = read_raw(&mut back_in) {
                let _ = back_out.write_all(&frame);
            }
            let _ = back_out.shutdown(std::net::Shutdown::Both);
        });
        let receiving = scope.spawn(move || rx.run(&mut Link(d), &mut |_| Flow::GoOn));
        let sent = tx.run(&mut Link(a), &mut |_| Flow::GoOn);
        [sent, receiving.join().unwrap()]
    })
}

#[test]
fn a_guest_arrives_with_a_key_and_without_and_not_with_two_keys() {
    for keyed in [false, true] {
        let (mut tx, mut rx) = (sender(keyed), receiver(keyed));
        let [sent, received] = through(&mut tx, &mut rx, |(_, frame)| vec![frame]);
        assert_eq!(
            (sent.unwrap().phase, received.unwrap().phase),
            (Phase::Done, Phase::Done)
        );
        assert_eq!(rx.target().pages, tx.source().pages);
        assert_eq!(rx.target().vcpus, tx.source().vcpus);
        assert!(rx.target().owned);
    }
    for (mut tx, mut rx) in [
        (sender(true), receiver(false)),
        (sender(false), receiver(true)),
    ] {
        let [sent, received] = through(&mut tx, &mut rx, |(_, frame)| vec![frame]);
        assert!(sent.is_err());
        assert_eq!(received, Err(MigrateError::Frame(FrameError::Tag)));
    }
}

/// Ways to use authentic frames of the same session against the guest.
#[derive(Clone, Copy, Debug)]
enum Attack {
    /// A page goes to another frame.
    Displace,
    /// Two pages change their places in the order.
    Swap,
    /// A page comes a second time, in the place of a later one.
    Replay,
    /// A page is left out.
    Drop,
}

fn attack(attack: Attack) -> impl FnMut(Raw) -> Vec<Vec<u8>> + Send {
    let mut kept: VecDeque<Vec<u8>> = VecDeque::new();
    let mut dropped = 0;
    let renumbered = |mut frame: Vec<u8>, like: &[u8]| {
        frame[8..16].copy_from_slice(&like[8..16]);
        frame
    };
    move |(kind, frame)| {
        if kind != PRIVATE {
            // The numbers that follow a frame that was dropped.
            let mut frame = frame;
            if dropped > 0 && kind > PRIVATE {
                let index = u64::from_le_bytes(frame[8..16].try_into().unwrap());
                frame[8..16].copy_from_slice(&(index - dropped).to_le_bytes());
                frame = with_checksum(frame);
            }
            return vec![frame];
        }
        let number = u64::from_le_bytes(frame[8..16].try_into().unwrap());
        match attack {
            Attack::Displace if number == 2 => {
                let mut frame = frame;
                frame[36] = 5;
                vec![with_checksum(frame)]
            }
            Attack::Swap if number == 2 => {
                kept.push_back(frame);
                vec![]
            }
            Attack::Swap if number == 3 => {
                let first = kept.pop_front().unwrap();
                let early = with_checksum(renumbered(frame.clone(), &first));
                vec![early, with_checksum(renumbered(first, &frame))]
            }
            Attack::Replay if number == 1 => {
                kept.push_back(frame.clone());
                vec![frame]
            }
            Attack::Replay if number == 4 => {
                let mut again = renumbered(kept.pop_front().unwrap(), &frame);
                again[36..44].copy_from_slice(&frame[36..44]);
                vec![with_checksum(again)]
            }
            Attack::Drop if number == 2 => {
                dropped = 1;
                vec![]
            }
            Attack::Drop if number > 2 => {
                let mut frame = frame;
                frame[8..16].copy_from_slice(&(number - 1).to_le_bytes());
                vec![with_checksum(frame)]
            }
            _ => vec![frame],
        }
    }
}

#[test]
fn with_a_key_no_frame_is_displaced_reordered_replayed_or_left_out() {
    use Attack::*;
    for how in [Displace, Swap, Replay, Drop] {
        let (mut tx, mut rx) = (sender(true), receiver(true));
        let [sent, received] = through(&mut tx, &mut rx, attack(how));
        assert_eq!(
            received,
            Err(MigrateError::Frame(FrameError::Tag)),
            "{how:?}"
        );
        assert!(sent.is_err() && !rx.target().owned && !rx.target().finished);
        // The session is whole: an honest link brings the guest.
        let [sent, received] = through(&mut tx, &mut rx, |(_, frame)| vec![frame]);
        assert!(
            sent.is_ok() && received.is_ok(),
            "{how:?} {sent:?} {received:?}"
        );
        assert_eq!(rx.target().pages, tx.source().pages);
    }
}

/// The attacks are real: without a key the checksum is no defence.
#[test]
fn without_a_key_an_attacker_on_the_link_displaces_pages() {
    let (mut tx, mut rx) = (sender(false), receiver(false));
    let _ = through(&mut tx, &mut rx, attack(Attack::Replay));
    assert_ne!(rx.target().pages, tx.source().pages);
}

#[test]
fn frames_of_an_earlier_link_of_the_same_session_are_refused() {
    let (mut tx, mut rx) = (sender(true), receiver(true));
    let mut recorded = Vec::new();
    let cut = |(kind, frame): Raw| {
        if kind == PRIVATE {
            recorded.push(frame);
            return vec![];
        }
        if kind > PRIVATE {
            vec![vec![0; 36]]
        } else {
            vec![frame]
        }
    };
    let [sent, received] = through(&mut tx, &mut rx, cut);
    assert!(sent.is_err() && received.is_err());
    assert_eq!(recorded.len(), FRAMES as usize);
    // None of them came: they are what is due, under the same numbers.
    let mut old = recorded.into_iter();
    let [_, received] = through(&mut tx, &mut rx, |(kind, frame)| match kind {
        PRIVATE => old.next().into_iter().collect(),
        _ => vec![frame],
    });
    assert_eq!(received, Err(MigrateError::Frame(FrameError::Tag)));
}

#[test]
fn a_session_that_was_recorded_whole_cannot_be_played_to_another_receiver() {
    let (mut tx, mut first) = (sender(true), receiver(true));
    let mut recorded = Vec::new();
    let [sent, _] = through(&mut tx, &mut first, |(_, frame)| {
        recorded.push(frame.clone());
        vec![frame]
    });
    sent.unwrap();
    let (mut near, far) = UnixStream::pair().unwrap();
    recorded
        .iter()
        .for_each(|frame| near.write_all(frame).unwrap());
    let mut again = Receiver::new(Guest::default()).with_key(KEY, [6; 16]);
    let received = again.run(&mut Link(far), &mut |_| Flow::GoOn);
    assert_eq!(received, Err(MigrateError::Frame(FrameError::Tag)));
    assert!(!again.target().owned);
}

fn frame(kind: u8, index: u64, payload: &[u8]) -> Vec<u8> {
    let mut frame = b"KOMS".to_vec();
    frame.extend([2, kind, 0, 0]);
    frame.extend(index.to_le_bytes());
    frame.extend((payload.len() as u32).to_le_bytes());
    frame.extend([0; 16]);
    frame.extend(payload);
    with_checksum(frame)
}

/// Hello and Start by hand.
fn opening() -> Vec<u8> {
    let mut hello = vec![7; 16];
    hello.extend([0; 8]);
    hello.push(1);
    hello.extend(0_u32.to_le_bytes());
    hello.extend(VCPUS.to_le_bytes());
    hello.extend(1_u16.to_le_bytes());
    hello.extend(0_u64.to_le_bytes());
    hello.extend(FRAMES.to_le_bytes());
    let mut bytes = frame(1, 0, &hello);
    bytes.extend(frame(4, 0, &[0; 12]));
    bytes
}

fn page(gfn: u64) -> Vec<u8> {
    let mut payload = gfn.to_le_bytes().to_vec();
    payload.resize(8 + PACKET_HEADER + PAGE, 1);
    payload
}

/// Plays bytes to a receiver that waits for a guest.
fn play(rx: &mut Receiver<Guest>, bytes: &[u8]) -> MigrateError {
    let (mut near, far) = UnixStream::pair().unwrap();
    let answers = near.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            let _ = near.write_all(bytes);
            let _ = near.shutdown(std::net::Shutdown::Write);
        });
        scope.spawn(move || {
            let mut answers = answers;
            while read_raw(&mut answers).is_some() {}
        });
        rx.run(&mut Link(far), &mut |_| Flow::GoOn).unwrap_err()
    })
}

#[test]
fn a_guest_without_all_pages_and_vcpus_is_not_finished() {
    for (frames, vcpus) in [(0, 0), (FRAMES - 1, VCPUS), (FRAMES, VCPUS - 1)] {
        let mut bytes = opening();
        let mut next = 0;
        for gfn in 0..frames {
            bytes.extend(frame(PRIVATE, next, &page(gfn)));
            next += 1;
        }
        for vcpu in 0..vcpus {
            let mut payload = vcpu.to_le_bytes().to_vec();
            payload.extend([0, 1]);
            bytes.extend(frame(9, next, &payload));
            next += 1;
        }
        bytes.extend(frame(12, next, &[]));
        bytes.extend(frame(14, next, &[]));
        let mut rx = receiver(false);
        let missing = ProtocolError::Incomplete {
            frames: FRAMES - frames,
            vcpus: VCPUS - vcpus,
        };
        let error = play(&mut rx, &bytes);
        assert_eq!(error, MigrateError::Protocol(missing));
        assert!(!error.can_go_on());
        assert!(!rx.target().finished && !rx.target().owned);
    }
}

#[test]
fn a_sender_that_never_ends_is_stopped_by_the_number_of_its_records() {
    let limits = ReceiveLimits { times: 3 };
    let most = 3 * (FRAMES + u64::from(VCPUS) + 1);
    let mut bytes = opening();
    for index in 0..most + 10 {
        bytes.extend(frame(PRIVATE, index, &page(index % FRAMES)));
    }
    let mut rx = receiver(false).with_limits(limits);
    let error = play(&mut rx, &bytes);
    assert_eq!(error, MigrateError::Protocol(ProtocolError::TooManyRecords));
    assert!(!error.can_go_on());
    assert_eq!(rx.progress().pages, most);
    // Rounds without pages count too.
    let mut bytes = opening();
    (0..most + 1).for_each(|_| bytes.extend(frame(10, 0, &[0; 4])));
    let error = play(&mut receiver(false).with_limits(limits), &bytes);
    assert_eq!(error, MigrateError::Protocol(ProtocolError::TooManyRecords));
}

#[test]
fn a_peer_that_is_silent_or_slow_holds_neither_end_beyond_the_deadline() {
    for drips in [false, true] {
        for sends in [false, true] {
            let (near, far) = UnixStream::pair().unwrap();
            let timeout = Duration::from_millis(50);
            near.set_read_timeout(Some(timeout)).unwrap();
            let end = Instant::now() + Duration::from_millis(200);
            let mut link = Deadline::new(Link(near), move || Instant::now() >= end);
            let begun = Instant::now();
            let ended = thread::scope(|scope| {
                let done = std::sync::atomic::AtomicBool::new(false);
                let done = &*Box::leak(Box::new(done));
                scope.spawn(move || {
                    let (mut far, bytes) = (far, opening());
                    for byte in bytes.chunks(1).cycle() {
                        if done.load(std::sync::atomic::Ordering::Relaxed) {
                            break;
                        }
                        if drips {
                            let _ = far.write_all(byte);
                        }
                        thread::sleep(Duration::from_millis(5));
                    }
                });
                let ended = match sends {
                    true => sender(false).run(&mut link, &mut |_| Flow::GoOn),
                    false => receiver(false).run(&mut link, &mut |_| Flow::GoOn),
                };
                done.store(true, std::sync::atomic::Ordering::Relaxed);
                ended
            });
            let error = ended.unwrap_err();
            assert!(error.can_go_on(), "{error:?}");
            assert!(begun.elapsed() < Duration::from_secs(5), "drips {drips}");
        }
    }
}

#[test]
fn garbage_ends_a_link_at_once_and_the_receiver_takes_the_next_guest() {
    let mut rx = receiver(false);
    for garbage in [
        &[0xff; 64][..],
        b"GET / HTTP/1.1\r\n\r\n..................",
        &[0; 40],
    ] {
        assert!(matches!(
            play(&mut rx, garbage),
            MigrateError::Frame(FrameError::Magic(_))
        ));
    }
    let mut tx = sender(false);
    let [sent, received] = through(&mut tx, &mut rx, |(_, frame)| vec![frame]);
    assert!(sent.is_ok() && received.is_ok());
}

#[test]
fn a_key_is_not_printed() {
    assert_eq!(format!("{KEY:?}"), "StreamKey(..)");
}
