package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

const (
	// eventBuffer holds events that nobody has read yet, some 1 KB each as the kernel counts them: those of a second
	// with 10,000 connections that begin and as many that end.
	eventBuffer = 16 << 20
	// eventsAtOnce bounds how many one call of Receive reads.
	eventsAtOnce = 512
	// maxEvent is more than the kernel puts into one (ctnetlink_nlmsg_size): a few hundred bytes, and the name of a
	// security context.
	maxEvent = 16 << 10
)

// Events are the connections that begin and end, as the kernel reports them. Its methods are for one goroutine, but for
// Close.
type Events struct {
	nl    *netlink.Conn
	raw   syscall.RawConn
	buf   []byte
	drops uint32 // of the socket, as of when it was asked last
	full  bool   // the kernel has dropped some, and goes on until the queue is empty

	closed atomic.Bool
}

// Listen returns the Events of the network namespace of the calling thread, of connections whose mark has the bits of
// mask as m has them when they begin and end. The kernel chooses them, by a filter at the socket. It makes up the event
// of every connection of the namespace all the same, as long as anybody listens, which is some microseconds a
// connection.
//
// With net.netfilter.nf_conntrack_events=2, the kernel's own choice since Linux 5.19, the end of a connection that
// began while nobody listened is not told. With 0 nothing is, and that is an error.
func Listen(m, mask egress.Mark) (*Events, error) {
	if b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_events"); err == nil && strings.TrimSpace(string(b)) == "0" {
		return nil, errors.New("listening to connections: the kernel tells of none: sysctl -w net.netfilter.nf_conntrack_events=1")
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("opening a conntrack socket: %w", err)
	}
	e := &Events{nl: c, buf: make([]byte, maxEvent)}
	err = c.SetReadBuffer(eventBuffer)
	if err == nil {
		err = c.SetBPF(marked(m, mask))
	}
	for _, group := range []uint32{unix.NFNLGRP_CONNTRACK_NEW, unix.NFNLGRP_CONNTRACK_DESTROY} {
		if err == nil { // the filter is there before there is anything to be filtered
			err = c.JoinGroup(group)
		}
	}
	if err == nil {
		e.raw, err = c.SyscallConn()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("listening to connections: %w", err)
	}
	return e, nil
}

// marked is a socket filter that lets those events pass whose mark has the bits of mask as m has them.
func marked(m, mask egress.Mark) []bpf.RawInstruction {
	const (
		// SKF_AD_OFF + SKF_AD_NLATTR of linux/filter.h: A is the offset of the attribute of type X, searched for from A
		// on; 0: none
		find = 0xfffff000 + 12
		all  = 0xffffffff
	)
	return []bpf.RawInstruction{
		{Op: unix.BPF_LDX | unix.BPF_W | unix.BPF_IMM, K: mark},
		{Op: unix.BPF_LD | unix.BPF_W | unix.BPF_IMM, K: unix.NLMSG_HDRLEN + headerLen},
		{Op: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: find},
		{Op: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0, Jt: 5}, // a connection without a mark
		{Op: unix.BPF_MISC | unix.BPF_TAX},
		{Op: unix.BPF_LD | unix.BPF_W | unix.BPF_IND, K: unix.NLA_HDRLEN},
		{Op: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: uint32(mask)},
		{Op: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(m & mask), Jf: 1},
		{Op: unix.BPF_RET | unix.BPF_K, K: all},
		{Op: unix.BPF_RET | unix.BPF_K, K: 0},
	}
}

// Receive waits for events, and calls began or ended for each that there is, but not for more than some hundreds. The
// Flow is theirs until they return. lost is how many events there were since the last call that the kernel could not
// keep, since nobody read them in time. Those of one connection come in their order. The error is os.ErrClosed, or what
// wraps it, after Close.
func (e *Events) Receive(began, ended func(*Flow)) (lost int, err error) {
	overrun, empty, read := false, false, 0
	var flow Flow
	waiting := e.raw.Read(func(fd uintptr) bool {
		for ; read < eventsAtOnce; read++ {
			n, e2 := unix.Read(int(fd), e.buf)
			switch {
			case errors.Is(e2, unix.EINTR):
				continue
			case errors.Is(e2, unix.EAGAIN):
				empty = true
				return read > 0 || overrun
			case errors.Is(e2, unix.ENOBUFS): // what is in the queue still comes
				overrun = true
				continue
			case e2 != nil:
				err = e2
				return true
			}
			if err = e.parse(e.buf[:n], &flow, began, ended); err != nil {
				return true
			}
		}
		return true
	})
	if overrun || e.full {
		lost = e.lost(overrun)
		e.full = !empty
	}
	if e.closed.Load() {
		return lost, fmt.Errorf("receiving events of connections: %w", os.ErrClosed)
	}
	if err = errors.Join(waiting, err); err != nil {
		return lost, fmt.Errorf("receiving events of connections: %w", err)
	}
	return lost, nil
}

// parse calls began or ended for each message of a datagram.
func (e *Events) parse(b []byte, flow *Flow, began, ended func(*Flow)) error {
	for len(b) >= unix.NLMSG_HDRLEN {
		n, typ := int(binary.NativeEndian.Uint32(b)), int(binary.NativeEndian.Uint16(b[4:]))
		if n < unix.NLMSG_HDRLEN+headerLen || n > len(b) {
			return fmt.Errorf("netlink message of %d bytes, of which %d are there", n, len(b))
		}
		*flow = Flow{}
		switch attributes := b[unix.NLMSG_HDRLEN+headerLen : n]; typ {
		case begin:
			if err := decode(attributes, flow); err != nil {
				return err
			}
			began(flow)
		case remove:
			if err := decode(attributes, flow); err != nil {
				return err
			}
			ended(flow)
		}
		b = b[min((n+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	}
	return nil
}

// lost returns how many events the socket dropped since it was asked last; where the kernel does not say, and it is
// known that there were some, one.
func (e *Events) lost(some bool) int {
	const dropped = 8 // SK_MEMINFO_DROPS of linux/sock_diag.h
	var info [dropped + 1]uint32
	var errno unix.Errno
	size := uint32(unsafe.Sizeof(info))
	err := e.raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	})
	n := 0
	if err == nil && errno == 0 && size == uint32(unsafe.Sizeof(info)) {
		n, e.drops = int(info[dropped]-e.drops), info[dropped]
	}
	if n == 0 && some {
		n = 1
	}
	return n
}

// SetReadBuffer says how many bytes of events wait for Receive at most, as the kernel counts them.
func (e *Events) SetReadBuffer(bytes int) error { return e.nl.SetReadBuffer(bytes) }

// Close ends a Receive that waits, and all later ones.
func (e *Events) Close() error {
	e.closed.Store(true)
	return e.nl.Close()
}
