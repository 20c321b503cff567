package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/natlog"
	"github.com/egret-project/egret/operator"
)

// whoFlags are the options of `egret who`.
type whoFlags struct {
	etcd             etcdFlags
	at, to, protocol string
	logs             []string
	agents           agentsFlags
	output           string
}

func whoCommand() *cobra.Command {
	var f whoFlags
	c := &cobra.Command{
		Use:   "who IP:PORT",
		Short: "Print which pod has, or had, a port of an egress IP",
		Long: "Print which node has, or had, a port of an egress IP, or the identifier of an ICMP echo, by etcd, and which pods used it toward whom: now by that node's kernel,\n" +
			"at another time by its log of connections (egret agent --nat-log). The agent of the node is asked: on that node by root, elsewhere with\n" +
			"--agents-port; else the command that asks it is printed. With --log, logs that were collected are searched, and nothing else is asked. The exit\n" +
			"status is 0 when it is known, 2 when no pod had the port, and 1 when that could not be known.",
		Example: "  egret who 203.0.113.5:41012 --at 2026-11-28T12:03:04Z\n  egret who '[2001:db8::5]:41012'\n  kubectl logs -n egret-system egret-agent-x7k2p | egret who 203.0.113.5:41012 --at 12:03:04 --log -",
		Args:    cobra.ExactArgs(1),
	}
	s := c.Flags()
	f.etcd.addOperator(s)
	s.StringVar(&f.at, "at", "", "the time in question: as 2026-11-28T12:03:04Z, as 12:03:04 of today, here, or as a duration, like 90s ago (default: now)")
	s.StringVar(&f.to, "to", "", "of connections to this address alone")
	s.StringVar(&f.protocol, "protocol", "", "of connections of this protocol alone: tcp, udp, icmp, icmpv6 ...")
	s.StringSliceVar(&f.logs, "log", nil, "search these files, in the order in which they were written, in place of asking; - is the standard input")
	f.agents.add(s)
	s.StringVarP(&f.output, "output", "o", "", "json or yaml (default: text)")
	c.RunE = configured(nil, func(c *cobra.Command, args []string) error { return f.run(c, args[0]) })
	return c
}

// question reads what is asked.
func (f *whoFlags) question(text string, now time.Time) (operator.WhoConfig, error) {
	cfg := operator.WhoConfig{
		Format: f.output, Question: natlog.Question{Protocol: f.protocol}, Pages: [2]string{agent.ConnectionsPage, agent.LogPage}, Namespace: f.etcd.cluster.namespace,
	}
	at, err := netip.ParseAddrPort(text)
	if err != nil {
		return cfg, fmt.Errorf("%q: want an egress IP and a port, like 203.0.113.5:41012 or [2001:db8::5]:41012", text)
	}
	cfg.IP, cfg.Port = at.Addr().Unmap(), at.Port()
	if cfg.Port == 0 {
		return cfg, errors.New("port 0: no connection has it")
	}
	if f.to != "" {
		if cfg.Destination, err = netip.ParseAddr(f.to); err != nil {
			return cfg, fmt.Errorf("--to %q: want an IPv4 or IPv6 address", f.to)
		}
		cfg.Destination = cfg.Destination.Unmap()
	}
	if cfg.From, cfg.To, err = momentOf(f.at, now); err != nil {
		return cfg, err
	}
	if cfg.Now = f.at == ""; !cfg.Now && cfg.From.After(now.Add(time.Second)) {
		return cfg, fmt.Errorf("--at %s: that is in the future: it is %s", f.at, now.Format(time.RFC3339))
	}
	return cfg, nil
}

// momentOf reads a time, which is as long as it is said precisely.
func momentOf(text string, now time.Time) (from, to time.Time, err error) {
	if text == "" {
		return now, now.Add(time.Millisecond), nil
	}
	if ago, err := time.ParseDuration(text); err == nil && ago >= 0 {
		from = now.Add(-ago)
		return from, from.Add(time.Second), nil
	}
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		if t, err = time.ParseInLocation("2006-01-02 15:04:05", text, now.Location()); err != nil {
			var clock time.Time
			if clock, err = time.Parse("15:04:05", text); err != nil {
				return t, t, fmt.Errorf("--at %q: want a time like 2026-11-28T12:03:04Z, 12:03:04 of today, or how long ago, like 90s", text)
			}
			t = time.Date(now.Year(), now.Month(), now.Day(), clock.Hour(), clock.Minute(), clock.Second(), clock.Nanosecond(), now.Location())
		}
	}
	if t.Nanosecond() == 0 {
		return t, t.Add(time.Second), nil
	}
	return t, t.Add(time.Millisecond), nil
}

func (f *whoFlags) run(c *cobra.Command, text string) error {
	cfg, err := f.question(text, time.Now())
	if err := errors.Join(err, operator.CheckReport(f.output)); err != nil {
		return err
	}
	if len(f.logs) > 0 {
		return f.search(c, cfg)
	}
	if cfg.Ask, err = f.agents.ask(); err != nil {
		return err
	}
	etcd, err := f.etcd.dial(c.Context(), quiet)
	if err != nil {
		return err
	}
	defer etcd.Close()
	return operator.Who(c.Context(), etcd, cfg, c.OutOrStdout())
}

// search searches logs.
func (f *whoFlags) search(c *cobra.Command, cfg operator.WhoConfig) error {
	var logs []io.Reader
	for _, name := range f.logs {
		if name == "-" {
			logs = append(logs, c.InOrStdin())
			continue
		}
		file, err := os.Open(name)
		if err != nil {
			return fmt.Errorf("--log: %w", err)
		}
		defer file.Close()
		logs = append(logs, file)
	}
	return operator.WhoInLogs(c.Context(), cfg, c.OutOrStdout(), logs...)
}
