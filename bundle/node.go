package bundle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/routing"
)

// maxElements is how many elements are listed of each nftables set: the largest have 262,144.
const maxElements = 5000

// OnNode reports whether the network namespace of the calling thread is one that an agent has programmed.
func OnNode() bool {
	for _, name := range []string{egress.OverlayLink, egress.AddressLink} {
		if _, err := netlink.LinkByName(name); err == nil {
			return true
		}
	}
	return false
}

// node collects what there is of this node.
func (a *archive) node(ctx context.Context, cfg Config) {
	for _, p := range []struct {
		name string
		as   form
		f    func(context.Context, io.Writer) error
	}{
		{"kernel.txt", text, machine},
		{"nftables.txt", text, tables},
		{"nft.txt", text, program},
		{"routing.txt", text, steering},
		{"rules.txt", text, rules},
		{"links.txt", text, links},
		{"sysctls.txt", text, sysctls},
		{"conntrack.txt", text, connections},
		{"check.json", object, func(_ context.Context, w io.Writer) error {
			findings, err := check.Run(cfg.NodeIP)
			return errors.Join(err, json.NewEncoder(w).Encode(findings))
		}},
	} {
		a.part(ctx, "node/"+p.name, p.as, p.f)
	}
	for _, page := range []string{"healthz", "readyz", "log-level", "metrics"} {
		a.part(ctx, "node/agent-"+page+".txt", text, func(ctx context.Context, w io.Writer) error { return ask(ctx, cfg.Agent, page, w) })
	}
	// crdsync runs on some nodes only.
	if err := ask(ctx, cfg.Crdsync, "healthz", io.Discard); errors.Is(err, unix.ECONNREFUSED) {
		return
	}
	for _, page := range []string{"healthz", "readyz", "log-level", "metrics"} {
		a.part(ctx, "node/crdsync-"+page+".txt", text, func(ctx context.Context, w io.Writer) error { return ask(ctx, cfg.Crdsync, page, w) })
	}
}

// ask writes what a daemon answers: also where it is not well, and says so.
func ask(ctx context.Context, address, page string, w io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if !monitor.IsLocal(address) {
		return fmt.Errorf("status address %q: want a loopback address and a port", address)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/"+page, nil)
	if err != nil {
		return err
	}
	// What listens there may not be Egret's: it sends nobody elsewhere.
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(r)
	if err != nil {
		return fmt.Errorf("asking the daemon at %s: %w", address, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		fmt.Fprintln(w, resp.Status)
	}
	_, err = io.Copy(w, io.LimitReader(resp.Body, maxFile+1)) // one more than it takes shows that it is cut
	return err
}

func machine(_ context.Context, w io.Writer) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("reading the kernel's version: %w", err)
	}
	fmt.Fprintln(w, unix.ByteSliceToString(u.Sysname[:]), unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Version[:]), unix.ByteSliceToString(u.Machine[:]))
	return files(w, "/proc/uptime", "/proc/loadavg", "/proc/meminfo")
}

// files writes what files say, each below its name. One that is not there is an error, after the others.
func files(w io.Writer, names ...string) error {
	var errs []error
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintf(w, "\n%s:\n%s", name, b)
	}
	return errors.Join(errs...)
}

func tables(_ context.Context, w io.Writer) error {
	t, err := nft.New(nft.Config{Shared: true}) // it owns nothing
	if err != nil {
		return err
	}
	defer t.Close()
	return t.List(w, maxElements)
}

// program writes what nft(8) lists, where there is one: it knows rules of other versions, too.
func program(ctx context.Context, w io.Writer) error {
	path, err := exec.LookPath("nft")
	for _, dir := range []string{"/usr/sbin", "/sbin"} { // root's own, which a PATH may not have
		if err != nil {
			path, err = exec.LookPath(filepath.Join(dir, "nft"))
		}
	}
	if err != nil {
		fmt.Fprintln(w, "there is no nft(8) here; nftables.txt has the tables")
		return nil
	}
	var errs []error
	for _, family := range []string{"inet", "arp", "netdev"} {
		c := exec.CommandContext(ctx, path, "list", "table", family, egress.TableName)
		c.Stdout, c.Stderr, c.WaitDelay = w, w, time.Second
		if err := c.Run(); err != nil {
			errs = append(errs, fmt.Errorf("nft list table %s %s: %w", family, egress.TableName, err))
		}
	}
	return errors.Join(errs...)
}

// steering writes links, addresses, neighbours, routes and rules that are Egret's.
func steering(_ context.Context, w io.Writer) error {
	r, err := routing.New(routing.Config{})
	if err != nil {
		return err
	}
	defer r.Close()
	o, err := r.Observe()
	if err != nil {
		return err
	}
	_, err = io.WriteString(w, o.String())
	return err
}

// rules writes all ip rules: those of others, too, decide by their order.
func rules(_ context.Context, w io.Writer) error {
	var errs []error
	for _, family := range []struct {
		name   string
		number int
	}{{"IPv4", unix.AF_INET}, {"IPv6", unix.AF_INET6}} {
		list, err := netlink.RuleList(family.number)
		if err != nil {
			errs = append(errs, fmt.Errorf("listing rules of %s: %w", family.name, err))
		}
		for _, r := range list {
			mask := uint32(0)
			if r.Mask != nil {
				mask = *r.Mask
			}
			fmt.Fprintf(w, "%s %d: mark 0x%x/0x%x table %d goto %d protocol %d: %s\n", family.name, r.Priority, r.Mark, mask, r.Table, r.Goto, r.Protocol, r)
		}
	}
	return errors.Join(errs...)
}

// links writes the links that are Egret's, with their counters, and the addresses of all: which of them are Egret's is
// to be seen then.
func links(_ context.Context, w io.Writer) error {
	all, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("listing links: %w", err)
	}
	for _, l := range all {
		a := l.Attrs()
		fmt.Fprintf(w, "%d: %s type %s mtu %d state %s flags %s address %s master %d", a.Index, a.Name, l.Type(), a.MTU, a.OperState, a.Flags, a.HardwareAddr, a.MasterIndex)
		if s := a.Statistics; s != nil && strings.HasPrefix(a.Name, egress.TableName) {
			fmt.Fprintf(w, " received %d packets, %d dropped, %d errors; sent %d packets, %d dropped, %d errors",
				s.RxPackets, s.RxDropped, s.RxErrors, s.TxPackets, s.TxDropped, s.TxErrors)
		}
		fmt.Fprintln(w)
		addresses, aerr := netlink.AddrList(l, netlink.FAMILY_ALL)
		err = errors.Join(err, aerr)
		for _, a := range addresses {
			fmt.Fprintf(w, "\t%s scope %d flags 0x%x\n", a.IPNet, a.Scope, a.Flags)
		}
	}
	return err
}

// settings are the sysctls that decide what becomes of packets of egresses; a star is each link.
var settings = []string{
	"net/ipv4/ip_forward", "net/ipv4/fwmark_reflect", "net/ipv4/ip_local_port_range", "net/ipv4/tcp_tw_reuse",
	"net/ipv4/conf/*/rp_filter", "net/ipv4/conf/*/arp_ignore", "net/ipv4/conf/*/arp_announce", "net/ipv4/conf/*/arp_filter", "net/ipv4/conf/*/proxy_arp",
	"net/ipv4/conf/*/forwarding", "net/ipv4/conf/*/accept_local", "net/ipv4/conf/*/src_valid_mark", "net/ipv4/conf/*/route_localnet",
	"net/ipv6/fwmark_reflect", "net/ipv6/conf/*/forwarding", "net/ipv6/conf/*/disable_ipv6", "net/ipv6/conf/*/proxy_ndp", "net/ipv6/conf/*/addr_gen_mode",
	"net/netfilter/nf_conntrack_*", "net/bridge/bridge-nf-call-*", "net/core/netdev_max_backlog",
}

func sysctls(_ context.Context, w io.Writer) error {
	for _, s := range settings {
		found, err := filepath.Glob("/proc/sys/" + s)
		if err != nil {
			return err
		}
		for _, path := range found {
			value, err := os.ReadFile(path)
			if err != nil {
				value = []byte("cannot be read") // some are for writing alone
			}
			fmt.Fprintf(w, "%s = %s\n", strings.TrimPrefix(path, "/proc/sys/"), strings.TrimSpace(string(value)))
		}
	}
	return nil
}

// connections writes how many there are, and what the kernel counts of them.
func connections(_ context.Context, w io.Writer) error {
	count, err := conntrack.CountByID(func(conntrack.Connection) bool { return true })
	all := 0
	for _, id := range slices.Sorted(maps.Keys(count)) {
		all += count[id]
		fmt.Fprintf(w, "%d of the egress IP with id %d\n", count[id], id)
	}
	fmt.Fprintf(w, "%d of Egret's in all\n", all)
	return errors.Join(err, files(w, "/proc/thread-self/net/stat/nf_conntrack"))
}
