package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"

	"github.com/egret-project/egret/store"
)

// history keeps the histories of egress IPs short, beside the loop: nothing waits for it.
type history struct {
	wake chan struct{} // capacity 1

	mu  sync.Mutex // guards ips
	ips map[netip.Addr]bool
}

func newHistory() *history {
	return &history{wake: make(chan struct{}, 1), ips: map[netip.Addr]bool{}}
}

// trim notes that the history of ip has grown.
func (h *history) trim(ip netip.Addr) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ips[ip] = true
	notify(h.wake)
}

func (h *history) run(ctx context.Context, c *store.Client, log *slog.Logger) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.wake:
		}
		h.mu.Lock()
		var ips []netip.Addr
		for ip := range h.ips {
			ips = append(ips, ip)
		}
		clear(h.ips)
		h.mu.Unlock()
		for _, ip := range ips {
			// What stays too long goes with the IP's next change of owner.
			if err := c.TrimHistory(ctx, ip); err != nil && ctx.Err() == nil {
				log.Warn("history not trimmed", "egress_ip", ip, "err", err)
			}
		}
	}
}
