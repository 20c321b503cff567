package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// firstAnswer holds the message of any entry: its attributes take some 300 bytes, and a label or helper of it no more
// than the rest.
const firstAnswer = 8 << 10

// choice is whether the kernel lists the connections of an address alone when it is asked to, by family, as far as that
// is known.
var choice struct {
	mu    sync.Mutex // guards known
	known map[byte]bool
}

// choosesAddresses reports whether the kernel lists the connections of an address alone when it is asked to, and
// whether there are any of the family. Before Linux 5.8 it lists all of them, and for IPv6 it has listed all others
// ever since (ctnetlink_filter_match_tuple takes equal addresses for different ones). So it is asked for those of an
// address that nobody has. That tells something only if there is a connection meanwhile: one is looked for before and
// after. What a kernel does stays so, and is asked once: each question is a look at the whole table.
func choosesAddresses(family byte) (chooses, empty bool, err error) {
	choice.mu.Lock()
	defer choice.mu.Unlock()
	if chooses, known := choice.known[family]; known {
		return chooses, false, nil
	}
	before, found, err := first(family, Filter{})
	if err != nil || !found {
		return true, err == nil, err
	}
	nobody := Filter{Source: netip.IPv6Unspecified()}
	if family == unix.AF_INET {
		nobody.Source = netip.IPv4Unspecified()
	}
	_, all, err := first(family, nobody)
	if err != nil {
		return false, false, err
	}
	after, found, err := first(family, Filter{})
	if err != nil {
		return false, false, err
	}
	if all || found && before.ID == after.ID && before.Source == after.Source && before.Destination == after.Destination {
		if choice.known == nil {
			choice.known = map[byte]bool{}
		}
		choice.known[family] = !all
	}
	return !all, false, nil
}

// first returns the first connection that the kernel lists for a filter, and whether there is one. It takes a socket of
// its own: a listing goes on only for as long as it is read.
func first(family byte, f Filter) (c Flow, found bool, err error) {
	q, err := question(family, f)
	if err != nil {
		return c, false, err
	}
	s, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return c, false, fmt.Errorf("opening a conntrack socket: %w", err)
	}
	defer s.Close()
	if _, err := s.Send(q); err != nil {
		return c, false, fmt.Errorf("listing connections: %w", err)
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return c, false, err
	}
	answer := make([]byte, firstAnswer)
	var n int
	var received error
	err = raw.Control(func(fd uintptr) { // the kernel has written the beginning before it took the question for sent
		n, _, received = unix.Recvfrom(int(fd), answer, unix.MSG_DONTWAIT)
	})
	if err := errors.Join(err, received); err != nil {
		return c, false, fmt.Errorf("listing connections: %w", err)
	}
	c, found, err = head(answer[:n])
	if err != nil {
		return c, false, fmt.Errorf("listing connections: %w", err)
	}
	return c, found, nil
}

// head reads the first message of an answer to a listing. False: it is the end.
func head(answer []byte) (c Flow, found bool, err error) {
	if len(answer) < unix.NLMSG_HDRLEN {
		return c, false, errShort
	}
	// nlmsg_len and nlmsg_type of linux/netlink.h
	length, typ := int(binary.NativeEndian.Uint32(answer)), binary.NativeEndian.Uint16(answer[4:])
	if typ == unix.NLMSG_DONE {
		return c, false, nil
	}
	if typ != begin || length < unix.NLMSG_HDRLEN+headerLen || length > len(answer) {
		return c, false, fmt.Errorf("a message of type %d and %d bytes", typ, length)
	}
	return c, true, decode(answer[unix.NLMSG_HDRLEN+headerLen:length], &c)
}
