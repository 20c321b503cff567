package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

// limit is for a new owner to appear, and for a pod to leave with its egress IP.
const limit = 20 * time.Second

// Gateway is whichever node of a lab owns an egress IP.
type Gateway struct {
	lab  *lab.Lab
	ip   netip.Addr
	etcd *clientv3.Client
}

// Open returns the gateway of an egress IP, which need not be there yet. Who calls it calls Close.
func Open(l *lab.Lab, ip netip.Addr) (*Gateway, error) {
	etcd, err := l.DialEtcd()
	if err != nil {
		return nil, err
	}
	return &Gateway{l, ip, etcd}, nil
}

// Close lets go of etcd.
func (g *Gateway) Close() error { return g.etcd.Close() }

// Owner waits until another node than not owns the IP, 20 s at most, and returns its name.
func (g *Gateway) Owner(ctx context.Context, not string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		r, err := g.etcd.Get(ctx, "/egret/owners/"+g.ip.String())
		if err != nil {
			return "", fmt.Errorf("waiting for an owner of %s other than %q: %w", g.ip, not, err)
		}
		for _, kv := range r.Kvs {
			var o egress.Owner
			if err := json.Unmarshal(kv.Value, &o); err != nil {
				return "", fmt.Errorf("reading the owner of %s: %w", g.ip, err)
			}
			if o.Node != not {
				return o.Node, nil
			}
		}
		if err := Sleep(ctx, 50*time.Millisecond); err != nil {
			return "", fmt.Errorf("waiting for an owner of %s other than %q: %w", g.ip, not, err)
		}
	}
}

// Apply makes objects, given as JSON or YAML, in a lab.
func Apply(ctx context.Context, l *lab.Lab, objects string) error {
	dir, err := os.MkdirTemp("", "egret-objects-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "objects")
	if err := os.WriteFile(file, []byte(objects), 0o644); err != nil {
		return err
	}
	if out, err := l.Kubectl(ctx, "apply", "-f", file); err != nil {
		return fmt.Errorf("making objects: %w\n%s", err, out)
	}
	return nil
}

// Leaves waits until a pod leaves with the source address ip in that family, 20 s at most.
func Leaves(ctx context.Context, l *lab.Lab, pod string, ip netip.Addr) error {
	to := lab.OutsideIP
	if ip.Is6() {
		to = lab.OutsideIP6
	}
	for deadline := time.Now().Add(limit); ; {
		got, err := l.SourceTo(ctx, pod, to)
		if err == nil && got == ip {
			return nil
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return fmt.Errorf("pod %s left as %v (%v), want %s", pod, got, err, ip)
		}
		if err := Sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}

// Sleep waits for d, or returns why ctx ended.
func Sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
