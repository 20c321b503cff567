package nft

import (
	"errors"
	"fmt"
	"sync"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// writer sends transactions. It is safe for concurrent use.
type writer struct {
	nl *netlink.Conn
	mu sync.Mutex // one transaction at a time
}

// commit sends ops as one transaction: the kernel takes all of it or, when there is an error, nothing. The error names
// the first part that was refused. Only an error in which no part is named, such as unix.ENOBUFS for lost answers,
// leaves open what happened.
func (w *writer) commit(ops []op) error {
	if len(ops) == 0 {
		return nil
	}
	return w.send(ops, true)
}

// send sends a transaction; without its end, the kernel only says what it would answer.
func (w *writer) send(ops []op, end bool) error {
	// Copies: sending writes sequence numbers into the messages, and ops may be sent again.
	msgs := []netlink.Message{bracket(unix.NFNL_MSG_BATCH_BEGIN)}
	lines := map[int]string{}
	for _, o := range ops {
		if o.err != nil {
			return fmt.Errorf("%s: %w", short(o.line), o.err)
		}
		for _, m := range o.msgs {
			m.Header.Flags |= netlink.Acknowledge
			lines[len(msgs)] = o.line
			msgs = append(msgs, m)
		}
	}
	if end {
		msgs = append(msgs, bracket(unix.NFNL_MSG_BATCH_END))
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	sent, err := w.nl.SendMessages(msgs)
	if err != nil {
		return err
	}
	waiting := map[uint32]string{}
	for i, m := range sent {
		if line, ok := lines[i]; ok {
			waiting[m.Header.Sequence] = line
		}
	}
	return w.answers(waiting)
}

// canOwn reports whether the kernel has tables that are owned and outlive their owner. One that is only owned would go
// with the agent. It tries a transaction that does not end, which the kernel looks at and drops.
func (w *writer) canOwn() (bool, error) {
	o := table{family: nftables.TableFamilyINet, name: egress.TableName + "-try", flags: flagsOwned}.addTable()
	err := w.send([]op{o}, false)
	var errno unix.Errno
	if errors.As(err, &errno) && (errno == unix.EOPNOTSUPP || errno == unix.EINVAL) {
		return false, nil
	}
	return err == nil, err
}

// answers reads until every message has its answer, and returns the first refusal.
func (w *writer) answers(waiting map[uint32]string) error {
	var first error
	refused := 0
	for len(waiting) > 0 {
		var msgs []netlink.Message
		err := receive(w.nl, answerTimeout, func(m netlink.Message) { msgs = append(msgs, m) })
		var refusal *netlink.OpError
		switch {
		case err == nil:
			for _, m := range msgs {
				delete(waiting, m.Header.Sequence)
			}
		case errors.As(err, &refusal) && waiting[refusal.Sequence] != "":
			if refused++; first == nil {
				first = fmt.Errorf("%s: %w", short(waiting[refusal.Sequence]), err)
			}
			delete(waiting, refusal.Sequence)
		default:
			// About the transaction as a whole, or the socket: what else comes must not be taken for an answer to the
			// next one.
			drain(w.nl)
			return errors.Join(err, first)
		}
	}
	if refused > 1 {
		return fmt.Errorf("%w (and %d more refused)", first, refused-1)
	}
	return first
}

// bracket is the message that begins or ends a transaction: struct nfgenmsg with the subsystem in its last field.
func bracket(typ int) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request},
		Data:   []byte{0, 0, 0, unix.NFNL_SUBSYS_NFTABLES},
	}
}

// short cuts a line that may have 500 elements.
func short(line string) string {
	const most = 120 // enough for a rule
	if len(line) <= most {
		return line
	}
	return line[:most] + " ..."
}
