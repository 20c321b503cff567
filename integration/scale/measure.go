package scale

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/vishvananda/netns"

	"github.com/egret-project/egret/egress"
)

// sample is what etcd and some processes have done until now.
type sample struct {
	at time.Time
	// Of etcd: reads; writes, which go through raft; renewals of leases; and events that were sent to watchers.
	reads, writes, renewals, events float64
	cpu                             map[string]time.Duration // by process
}

// etcdMetrics reads what etcd says of itself.
func etcdMetrics(ctx context.Context, endpoint string) (map[string]*dto.MetricFamily, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+endpoint+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("reading the metrics of etcd: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("reading the metrics of etcd: %w", err)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	return parser.TextToMetricFamilies(bytes.NewReader(text))
}

// counted sums a counter over the metrics that have one of the values in the label; no label: over all.
func counted(families map[string]*dto.MetricFamily, name, label string, values ...string) (sum float64) {
	for _, m := range families[name].GetMetric() {
		is := label == ""
		for _, l := range m.GetLabel() {
			for _, v := range values {
				is = is || l.GetName() == label && l.GetValue() == v
			}
		}
		if is {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

// take takes a sample.
func (b *bench) take(ctx context.Context) (sample, error) {
	m, err := etcdMetrics(ctx, b.lab.EtcdEndpoints()[0])
	if err != nil {
		return sample{}, err
	}
	s := sample{at: time.Now(), cpu: map[string]time.Duration{}}
	handled := func(methods ...string) float64 {
		return counted(m, "grpc_server_handled_total", "grpc_method", methods...)
	}
	s.writes = counted(m, "etcd_server_proposals_applied_total", "")
	// Raft has nothing of a transaction that cannot write: that is a read, as the question whether a lease is there.
	s.reads = handled("Range", "Txn") - (s.writes - handled("LeaseGrant", "LeaseRevoke"))
	s.renewals = counted(m, "etcd_debugging_lease_renewed_total", "")
	s.events = counted(m, "etcd_debugging_mvcc_events_total", "")
	for name, pid := range b.pids {
		if s.cpu[name], err = cpuTime(pid); err != nil {
			return s, err
		}
	}
	return s, nil
}

// rates are what a sample has more than another one, a second, and the share of a core that each process used in
// between.
type rates struct {
	reads, writes, renewals, events float64
	cpu                             map[string]float64
	seconds                         float64
}

func (s sample) since(o sample) rates {
	d := s.at.Sub(o.at).Seconds()
	r := rates{(s.reads - o.reads) / d, (s.writes - o.writes) / d, (s.renewals - o.renewals) / d, (s.events - o.events) / d, map[string]float64{}, d}
	for name := range s.cpu {
		r.cpu[name] = (s.cpu[name] - o.cpu[name]).Seconds() / d
	}
	return r
}

// clockTicks is USER_HZ: 100 on all architectures that Linux has it for (proc_pid_stat(5)).
const clockTicks = 100

// cpuTime returns how much CPU a process has used.
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("reading the CPU time of process %d: %w", pid, err)
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 13 {
		return 0, fmt.Errorf("reading the CPU time of process %d: %q", pid, b)
	}
	user, err1 := strconv.ParseInt(string(f[11]), 10, 64)
	system, err2 := strconv.ParseInt(string(f[12]), 10, 64)
	return time.Duration(user+system) * time.Second / clockTicks, errors.Join(err1, err2)
}

// memory returns the resident memory of a process, in MB, now and at its highest.
func memory(pid int) (now, most float64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("reading the memory of process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(b)) {
		name, rest, _ := strings.Cut(line, ":")
		if name != "VmRSS" && name != "VmHWM" {
			continue
		}
		kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
		if err != nil {
			return 0, 0, fmt.Errorf("reading the memory of process %d: %w", pid, err)
		}
		if name == "VmRSS" {
			now = kb / 1024
		} else {
			most = kb / 1024
		}
	}
	return now, most, nil
}

// kernel reads the tables of Egret in a node.
type kernel struct{ conn *nftables.Conn }

// openKernel opens nftables in the network namespace of the calling thread.
func openKernel() (*kernel, error) {
	ns, err := netns.Get()
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)), nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	return &kernel{c}, nil
}

var egretTable = &nftables.Table{Name: egress.TableName, Family: nftables.TableFamilyINet}

// pods returns the marks of the node's selected pods: of which egress they are.
func (k *kernel) pods() (map[netip.Addr]string, error) {
	set, err := k.conn.GetSetByName(egretTable, "pod4")
	if err != nil {
		return nil, fmt.Errorf("reading the node's pods: %w", err)
	}
	all, err := k.conn.GetSetElements(set)
	if err != nil {
		return nil, fmt.Errorf("reading the node's pods: %w", err)
	}
	out := map[netip.Addr]string{}
	for _, e := range all {
		if ip, ok := netip.AddrFromSlice(e.Key); ok {
			out[ip] = string(e.Val)
		}
	}
	return out, nil
}

// permitted returns for how many egress IPs the node may send.
func (k *kernel) permitted() (int, error) {
	n := 0
	for _, name := range []string{"permit4", "permit6"} {
		set, err := k.conn.GetSetByName(egretTable, name)
		if err != nil {
			return 0, fmt.Errorf("reading the node's permits: %w", err)
		}
		all, err := k.conn.GetSetElements(set)
		if err != nil {
			return 0, fmt.Errorf("reading the node's permits: %w", err)
		}
		n += len(all)
	}
	return n, nil
}
