package announce

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/packet"
)

const (
	// settled is how old an announcement must be before another host that speaks for the address counts: frames of a
	// former owner may still be under way.
	settled = time.Second
	// defend is the time between two announcements against another host that uses the address (DEFEND_INTERVAL of RFC
	// 5227, section 1.1). It doubles with each of them, up to period: a fight that is not won soon is for a person to
	// end.
	defend = 10 * time.Second
	// conflictTime is for how long another host is reported after it was last heard to use the address.
	conflictTime = period
)

// saw notes that another host uses an address that is announced on the link, and defends the address, more and more
// seldom.
func (a *Announcer) saw(link string, ip netip.Addr, mac net.HardwareAddr) {
	if !a.speaks(link, ip) {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	e, now := a.schedule[ip], time.Now()
	if e == nil || e.link != link || now.Sub(e.since) < settled {
		return
	}
	e.heard = now
	defends := !now.Before(e.defended.Add(e.pause))
	// A host may say that it has another MAC address with every frame: that is told of as often as the IP is defended.
	if c := (Conflict{link, mac.String()}); e.conflict != c && defends {
		e.conflict = c
		a.log.Warn("another host uses an egress IP of this node", "egress_ip", ip, "iface", link, "mac", c.MAC)
		a.changed()
	}
	if defends {
		e.defended, e.due, e.pause = now, now, min(max(2*e.pause, defend), period)
		a.poke()
	}
}

// Conflicts returns the other hosts that were heard lately to use an address that is announced.
func (a *Announcer) Conflicts() map[netip.Addr]Conflict {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := map[netip.Addr]Conflict{}
	for ip, e := range a.schedule {
		if e.conflict != (Conflict{}) {
			out[ip] = e.conflict
		}
	}
	return out
}

// expire drops the conflicts with hosts that were not heard for conflictTime.
func (a *Announcer) expire() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for ip, e := range a.schedule {
		if e.conflict != (Conflict{}) && time.Since(e.heard) >= conflictTime {
			a.log.Info("the other host uses the egress IP no more", "egress_ip", ip, "iface", e.link, "mac", e.conflict.MAC)
			e.conflict, e.pause = Conflict{}, 0
			a.changed()
		}
	}
}

// listener receives ARP on links, and reports who uses which IPv4 address.
type listener struct {
	log   *slog.Logger
	heard func(link string, ip netip.Addr, mac net.HardwareAddr)
	conns map[int]*packet.Conn // by the link's index: one that is made anew has another
	err   string               // the last one that was logged
	wg    sync.WaitGroup
}

// follow makes l listen on the links of IPv4 addresses, and on no others. What fails is tried again by the next call.
func (l *listener) follow(ctx context.Context, want map[netip.Addr]string) {
	links := map[int]*net.Interface{}
	var errs []error
	find := eachLinkOnce()
	for _, name := range want {
		ifi, err := find(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		links[ifi.Index] = ifi
	}
	for index, c := range l.conns {
		if links[index] == nil {
			c.Close()
			delete(l.conns, index)
		}
	}
	for index, ifi := range links {
		if l.conns[index] != nil {
			continue
		}
		c, err := packet.Listen(ifi, packet.Datagram, int(ethernet.EtherTypeARP), nil)
		if err != nil {
			errs = append(errs, fmt.Errorf("opening a packet socket on %s: %w", ifi.Name, err))
			continue
		}
		l.conns[index] = c
		l.wg.Go(func() { l.listen(ctx, c, ifi) })
	}
	text := ""
	if len(errs) > 0 {
		if text = errs[0].Error(); text != l.err {
			l.log.Warn("other holders of egress IPs not listened for, will retry", "err", errs[0])
		}
	}
	l.err = text
}

// listen listens until the socket is closed.
func (l *listener) listen(ctx context.Context, c *packet.Conn, ifi *net.Interface) {
	for {
		ip, mac, err := readARP(c)
		switch {
		case errors.Is(err, net.ErrClosed) || ctx.Err() != nil:
			return
		case err != nil:
			// The link went down. Should it stay an error, it costs next to nothing.
			time.Sleep(10 * time.Millisecond)
		case ip.IsValid() && mac.String() != ifi.HardwareAddr.String():
			l.heard(ifi.Name, ip, mac)
		}
	}
}

// close ends what listens.
func (l *listener) close() {
	for _, c := range l.conns {
		c.Close()
	}
	l.wg.Wait()
}
