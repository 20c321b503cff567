package conntrack

import (
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// stats asks what each processor has counted, of nfnetlink_conntrack.h: no entry is looked at for that.
const stats = unix.NFNL_SUBSYS_CTNETLINK<<8 | 4

// Check reports whether the kernel, in the network namespace of the calling thread, lacks what this package needs, in
// words that name it.
func Check() error { return check(stats) }

// check asks a question of a kind, whatever the answer.
func check(kind int) error {
	t, err := open()
	if err != nil {
		return err
	}
	if err = t.nl.SetReadDeadline(time.Now().Add(10 * time.Second)); err == nil {
		_, err = t.nl.Execute(message(kind, netlink.Dump, unix.AF_UNSPEC, nil))
	}
	switch {
	case errors.Is(err, unix.EPERM):
		err = fmt.Errorf("not allowed to ask for connections (CAP_NET_ADMIN): %w", err)
	case err != nil:
		err = fmt.Errorf("kernel that tells of no connections (CONFIG_NF_CT_NETLINK): %w", err)
	}
	return errors.Join(err, t.nl.Close())
}
