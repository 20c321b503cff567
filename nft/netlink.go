package nft

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// answerTimeout is how long the kernel may take for a message of its answer. It answers within the call that asks, and
// goes on with a listing within each call that receives, so that only what is lost, or a fault of the kernel, takes
// longer.
const answerTimeout = 10 * time.Second

// reader asks the kernel for its ruleset. It is safe for concurrent use.
type reader struct {
	nl      *netlink.Conn
	mu      sync.Mutex    // one question at a time
	timeout time.Duration // 0: answerTimeout
}

// attrs are the attributes of a message or of a nested attribute, by type.
type attrs map[uint16][]byte

func (a attrs) string(n uint16) string {
	b := a[n]
	for len(b) > 0 && b[len(b)-1] == 0 {
		b = b[:len(b)-1]
	}
	return string(b)
}

// uint32 returns 0 for an absent attribute, as the kernel means it.
func (a attrs) uint32(n uint16) uint32 {
	if len(a[n]) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(a[n])
}

func (a attrs) uint64(n uint16) uint64 {
	if len(a[n]) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(a[n])
}

// decode returns the attributes in b. Of several with one type the last counts.
func decode(b []byte) (attrs, error) {
	a := attrs{}
	return a, each(b, func(n uint16, b []byte) error { a[n] = b; return nil })
}

// each calls f for every attribute in b, with its type and data, until f returns an error.
func each(b []byte, f func(n uint16, b []byte) error) error {
	d, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return fmt.Errorf("decoding netlink attributes: %w", err)
	}
	for d.Next() {
		if err := f(d.Type(), d.Bytes()); err != nil {
			return err
		}
	}
	if err := d.Err(); err != nil {
		return fmt.Errorf("decoding netlink attributes: %w", err)
	}
	return nil
}

func attrName(n uint16, s string) netlink.Attribute {
	return netlink.Attribute{Type: n, Data: append([]byte(s), 0)}
}

// get asks for one object. The error is the kernel's: unix.ENOENT for what is not there.
func (r *reader) get(typ int, t table, list ...netlink.Attribute) ([]attrs, error) {
	return r.ask(typ, t.family, 0, list)
}

// dump asks for all objects of a kind in the family of the table, of the table alone when list names it and the kernel
// can tell.
func (r *reader) dump(typ int, t table, list ...netlink.Attribute) ([]attrs, error) {
	return r.ask(typ, t.family, netlink.Dump, list)
}

func (r *reader) ask(typ int, f nftables.TableFamily, flags netlink.HeaderFlags, list []netlink.Attribute) ([]attrs, error) {
	q, err := request(typ, f, flags, func(e *netlink.AttributeEncoder) {
		for _, a := range list {
			e.Bytes(a.Type, a.Data)
		}
	})
	if err != nil {
		return nil, err
	}
	return r.execute(q, flags)
}

func (r *reader) execute(q netlink.Message, flags netlink.HeaderFlags) ([]attrs, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	msgs, err := r.exchange(q)
	if err != nil {
		drain(r.nl) // what is left of it must not be taken for the next answer
		if errors.Is(err, unix.EINTR) {
			err = errors.Join(errChanged, err)
		}
		return nil, err
	}
	var out []attrs
	for _, m := range msgs {
		if m.Header.Flags&netlink.DumpInterrupted != 0 && flags&netlink.Dump == netlink.Dump {
			return nil, errChanged
		}
		if len(m.Data) < 4 {
			return nil, fmt.Errorf("netlink message of %d bytes", len(m.Data))
		}
		a, err := decode(m.Data[4:])
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// exchange sends a question and returns the messages of its answer.
func (r *reader) exchange(q netlink.Message) ([]netlink.Message, error) {
	sent, err := r.nl.Send(q)
	if err != nil {
		return nil, err
	}
	var msgs []netlink.Message
	if err := receive(r.nl, cmp.Or(r.timeout, answerTimeout), func(m netlink.Message) { msgs = append(msgs, m) }); err != nil {
		return nil, err
	}
	return msgs, netlink.Validate(sent, msgs)
}

// receive calls f for each message of an answer. The kernel may take timeout for each of them: a listing of a large set
// takes longer than that on a slow machine.
func receive(nl *netlink.Conn, timeout time.Duration, f func(netlink.Message)) error {
	var renewed time.Time
	renew := func() error {
		now := time.Now()
		if now.Sub(renewed) < timeout/2 {
			return nil
		}
		renewed = now
		return nl.SetReadDeadline(now.Add(timeout))
	}
	if err := renew(); err != nil {
		return err
	}
	for m, err := range nl.ReceiveIter() {
		if err == nil {
			err = renew()
		}
		if err != nil {
			return err
		}
		f(m)
	}
	return nil
}

// generation returns the number of the ruleset's generation: every commit, of whomever, counts it up before it shows.
func (r *reader) generation() (uint32, error) {
	m, err := r.ask(unix.NFT_MSG_GETGEN, nftables.TableFamilyUnspecified, 0, nil)
	if err != nil {
		return 0, fmt.Errorf("reading the generation of the ruleset: %w", err)
	}
	if len(m) != 1 {
		return 0, fmt.Errorf("reading the generation of the ruleset: %d answers", len(m))
	}
	return m[0].uint32(unix.NFTA_GEN_ID), nil
}

// settle waits for a commit that is under way. The number of the generation is counted up before the commit takes out
// what was deleted, element by element, and a dump that goes on where it was, by count, misses others meanwhile. An
// empty batch waits for the lock that commits hold, and changes nothing. The kernel does all of it within the call that
// sends.
func (r *reader) settle() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err := r.nl.SendMessages([]netlink.Message{bracket(unix.NFNL_MSG_BATCH_BEGIN), bracket(unix.NFNL_MSG_BATCH_END)})
	if err != nil {
		return fmt.Errorf("waiting for changes of the ruleset that are under way: %w", err)
	}
	return nil
}

// whole runs what, which reads a generation, until nothing changed from its begin to its end. That a table or a set
// vanished in between shows as an error of the read, so a failed read is repeated too when the ruleset has changed.
func (r *reader) whole(what func(generation uint32) error) error {
	var err error
	for range reads {
		before, gerr := r.generation()
		if gerr != nil {
			return gerr
		}
		if err := r.settle(); err != nil {
			return err
		}
		err = what(before)
		after, gerr := r.generation()
		if gerr != nil {
			return errors.Join(err, gerr)
		}
		if before == after && !errors.Is(err, errChanged) {
			return err
		}
	}
	return errors.Join(fmt.Errorf("%w, %d times", errChanged, reads), err)
}

// drain throws away what is left to be received: the kernel answers within the call that asks, so all of it is there,
// and goes on with a listing within each call that receives.
func drain(nl *netlink.Conn) {
	raw, err := nl.SyscallConn()
	if err != nil {
		return // closed
	}
	var b [1]byte // the rest of a message is thrown away with it
	_ = raw.Control(func(fd uintptr) {
		for {
			_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_DONTWAIT)
			if err != nil && err != unix.ENOBUFS && err != unix.EINTR { // EAGAIN: there is nothing
				return
			}
		}
	})
}
