package nft

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// ErrNoTable says that a set for permits is not there: the tables were never applied, or someone removed them.
var ErrNoTable = errors.New("nftables tables of egret are not there")

// ErrStale says that a transaction did not fit the kernel: something changed since it was observed. Nothing was
// written.
var ErrStale = errors.New("the ruleset is not as it was observed")

// Config says what Tables work with. The zero Config is valid.
type Config struct {
	Log *slog.Logger // default: none
	// Shared leaves the tables open to the writes of others, as kernels before 6.9 do in any case.
	Shared bool
}

// Tables are our tables in one network namespace. All methods are safe for concurrent use.
type Tables struct {
	log    *slog.Logger
	socket uint32 // that of write, where tables are owned by it
	read   reader
	write  writer
	watch  *netlink.Conn
	clock  reader // for renewals alone: they wait for no other question

	observing  sync.Mutex // guards what is known of the kernel
	observed   Observed   // as it was read last, with what Apply wrote since; without tables: it is not known
	generation uint32     // of the ruleset when it was observed
	wholeAt    time.Time  // when everything was read last
	serial     uint64     // of the last Observe
	events     *events

	frames frames
	renew  sync.Mutex  // one renewal at a time; guards ticket
	ticket egress.Mark // the number of the last one
}

// The buffers of the sockets. A transaction is one message of the socket, and the kernel charges it whole: 50,000
// elements take 3 MB. It answers every part with a packet of its own, about 1 KB with all that belongs to it. Root may
// exceed the limits of sysctl.
const (
	sendBuffer    = 32 << 20
	receiveBuffer = 8 << 20
)

// New opens the netlink sockets in the network namespace of the calling thread, where they stay: methods work from any
// thread. It writes nothing. Close must be called.
func New(cfg Config) (*Tables, error) {
	t := &Tables{log: cfg.Log, frames: -1, events: newEvents()}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	for _, c := range []**netlink.Conn{&t.read.nl, &t.write.nl, &t.watch, &t.clock.nl} {
		var err error
		if *c, err = dial(); err != nil {
			return nil, errors.Join(fmt.Errorf("opening a netlink socket: %w", err), t.Close())
		}
	}
	var err error
	if t.frames, err = openFrames(); err != nil {
		return nil, errors.Join(fmt.Errorf("opening a packet socket: %w", err), t.Close())
	}
	// From now on, so that no change falls between the first Observe and Watch.
	if err := t.watch.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return nil, errors.Join(fmt.Errorf("joining the nftables group: %w", err), t.Close())
	}
	if !cfg.Shared {
		can, err := t.write.canOwn()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("asking whether tables can be owned: %w", err), t.Close())
		}
		if can {
			t.socket = t.write.nl.PID()
		}
	}
	return t, nil
}

func dial() (*netlink.Conn, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	if err := prepare(c); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func prepare(c *netlink.Conn) error {
	return errors.Join(
		c.SetWriteBuffer(sendBuffer), c.SetReadBuffer(receiveBuffer),
		// Errors say in words what was wrong. Not together with CapAcknowledge: netlink v1.11.2 looks for the words
		// behind the refused message even when that is left out.
		c.SetOption(netlink.ExtendedAcknowledge, true),
	)
}

// Close closes the sockets. What is in the kernel stays.
func (t *Tables) Close() error {
	var errs []error
	for _, c := range []*netlink.Conn{t.read.nl, t.write.nl, t.watch, t.clock.nl} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	if t.frames >= 0 {
		errs = append(errs, t.frames.close())
	}
	return errors.Join(errs...)
}

// Apply writes changes: all of them, or nothing, but that tables were taken over, and an error. Empty Changes write
// nothing. The error is ErrStale when the kernel is no more as it was observed, also because these very Changes were
// applied before: observe again, and apply what is left.
func (t *Tables) Apply(c Changes) error {
	if c.Empty() {
		return nil
	}
	start := time.Now()
	t.observing.Lock()
	defer t.observing.Unlock()
	known := t.observed
	t.observed = Observed{}
	for _, ops := range [][]op{c.tables, c.ops} {
		err := t.write.commit(ops)
		if err == nil {
			continue
		}
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) {
			err = errors.Join(ErrStale, err)
		}
		return fmt.Errorf("applying %d changes of nftables: %w", len(ops), err)
	}
	if err := t.deleteDelayed(c.known); err != nil {
		t.log.Warn("the next pods with the addresses of new ones may not be delayed", "err", err) // all else is done
	}
	for _, r := range c.Repairs {
		if table, ok := strings.CutSuffix(r, absent); ok {
			t.log.Info("nftables table made", "table", table)
		} else {
			t.log.Warn("nftables table mended", "table", r)
		}
	}
	if c.after != nil && c.of == known.serial {
		known.tables = slices.Clone(known.tables) // the caller has the former ones
		for i := range known.tables {
			known.tables[i].elements = c.after[i]
		}
		t.serial++ // other Changes to what was observed do not fit any more
		known.serial, t.observed = t.serial, known
	}
	t.log.Debug("nftables applied", "dur", time.Since(start))
	return nil
}

// deleteDelayed takes addresses out of the sets of sources that were delayed: the next pod that gets one is to be delayed,
// too, also where it has the same link and MAC address. It is no part of the transaction that makes them known: what
// others send may fill the sets, and then the kernel takes nothing that is not in them, as what has ended meanwhile.
func (t *Tables) deleteDelayed(ips []netip.Addr) error {
	inet := table{family: nftables.TableFamilyINet, name: egress.TableName}
	var errs []error
	for _, f := range families {
		known := map[string]bool{}
		for _, ip := range ips {
			if ip.BitLen() == 8*int(f.address.Bytes) {
				known[key(ip)] = true
			}
		}
		if len(known) == 0 {
			continue
		}
		for _, set := range []string{"seen" + f.digit, "held" + f.digit} {
			list, err := t.dumpSet(inet, set)
			if err != nil {
				errs = append(errs, fmt.Errorf("reading who was delayed: %w", err))
				continue
			}
			list = slices.DeleteFunc(list, func(e element) bool { return !known[e.key[:f.address.Bytes]] })
			var ops []op
			for part := range slices.Chunk(list, batch) {
				names, gone := make([]string, len(part)), make([]element, len(part))
				for i, e := range part {
					names[i], gone[i] = f.via.print(e.key), element{key: e.key}
					part[i] = element{key: e.key, timeout: tick} // deleting one that has ended fails
				}
				ops = append(ops, inet.addElements(set, names, part), inet.deleteElements(set, names, gone))
			}
			if err := t.write.commit(ops); err != nil {
				errs = append(errs, fmt.Errorf("deleting who was delayed: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

// Delete removes all our tables, with all that is in them. That one is absent is no error.
func (t *Tables) Delete() error {
	t.observing.Lock()
	defer t.observing.Unlock()
	t.observed = Observed{}
	var errs []error
	for _, table := range tables(State{}) {
		if err := t.write.commit([]op{table.deleteTable()}); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("deleting the nftables tables: %w", err))
		}
	}
	return errors.Join(errs...)
}
