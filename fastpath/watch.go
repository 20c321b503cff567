package fastpath

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Watch calls changed once it listens, so that nothing before is missed, and then after every change of an IPsec policy
// in the network namespace of the calling thread: with one there Diff lets nothing be attached, and until that is
// applied packets pass the policy by. It returns nil when ctx ends, or the kernel has no IPsec. changed must not block.
func (p *Path) Watch(ctx context.Context, changed func()) error {
	s, err := nl.Subscribe(unix.NETLINK_XFRM, nl.XFRMNLGRP_POLICY)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("watching IPsec policies: %w", err)
	}
	defer s.Close()
	stop := context.AfterFunc(ctx, s.Close) // ends the blocked read
	defer stop()
	changed()
	for {
		_, _, err := s.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !errors.Is(err, unix.ENOBUFS): // some were dropped: a change
			return fmt.Errorf("watching IPsec policies: %w", err)
		}
		changed()
	}
}
