package connections

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Kind is how the two ends of a connection talk.
type Kind string

// The kinds.
const (
	TCP  Kind = "tcp"  // the pod asks, the server answers
	Push Kind = "push" // TCP, and only the server speaks once the pod has said who it is
	// the pod asks; the server answers the address and port that the connection began with, and no other
	UDP Kind = "udp"
	// UDP; the server answers whichever port it last saw, as it knows the connection by an id in the datagram (RFC
	// 9000, section 9)
	QUIC Kind = "quic"
	ICMP Kind = "icmp" // echo; the identifier is in the place of a source port
)

// Kinds are all kinds, in the order of tables and plots.
var Kinds = []Kind{TCP, Push, UDP, QUIC, ICMP}

// message is what both ends send, all of it of one length, so that TCP needs no other framing.
type message struct {
	id   uint64        // of the connection
	sent time.Duration // on the clock of the measurement
}

const messageSize = 16

func (m message) bytes() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(make([]byte, 0, messageSize), m.id), uint64(m.sent))
}

// parse reads a message; ok is false for what is too short.
func parse(b []byte) (m message, ok bool) {
	if len(b) < messageSize {
		return message{}, false
	}
	return message{binary.BigEndian.Uint64(b), time.Duration(binary.BigEndian.Uint64(b[8:]))}, true
}

// connection is one of those that are measured.
type connection struct {
	kind Kind
	id   uint64
	pod  int
	port uint16              // its source port in the pod, or its identifier
	send func(message) error // of the end that speaks first; set once, before the sending begins

	mu          sync.Mutex // guards what follows
	established bool       // something arrived before the fault
	source      netip.AddrPort
	others      []netip.AddrPort // sources that the server saw later
	first       time.Duration    // from the fault to the arrival of what was sent after it; 0: nothing was
	last        time.Duration    // when what arrived last was sent
	at          time.Duration    // when that arrived
	silence     time.Duration    // the longest time without an arrival, from the fault on
	errs        int
	err         error // the first
}

// arrived tells that what was sent at some time has come to the pod: the answer to it, or what the server pushed. fault
// is when the fault began, 0 before.
func (c *connection) arrived(now, sent, fault time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if fault == 0 {
		c.established = true
	} else {
		c.silence = max(c.silence, now-max(c.at, fault))
		if c.first == 0 && sent >= fault {
			c.first = max(now-fault, 1)
		}
	}
	c.last, c.at = max(c.last, sent), now
}

// seen tells that the server got something of the connection, and reports whether that came from where the connection
// began.
func (c *connection) seen(from netip.AddrPort) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.source.IsValid() {
		c.source = from
	}
	if from != c.source && !slices.Contains(c.others, from) {
		c.others = append(c.others, from)
	}
	return from == c.source
}

// failed tells of an error at either end.
func (c *connection) failed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.errs++; c.err == nil {
		c.err = err
	}
}

// result sums up the connection; alive are those of which something sent at since or later has arrived.
func (c *connection) result(pod string, since time.Duration) Result {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := Result{
		Kind: c.kind, Pod: pod, Port: c.port, Established: c.established, First: c.first, Silence: c.silence, Changed: len(c.others),
		Errors: c.errs, Alive: c.established && c.last >= since,
	}
	if c.kind == QUIC && len(c.others) > 0 { // it lives by the grace of its protocol only
		r.Alive = false
	}
	if c.err != nil {
		r.Error = c.err.Error()
	}
	return r
}
