package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/natlog"
	"github.com/egret-project/egret/operator"
)

// agentSocket is where the agent of this node is asked; tests have one of their own.
var agentSocket = agent.Socket

// whoFlags are the options of `egret who`.
type whoFlags struct {
	etcd                            etcdFlags
	at, to, protocol                string
	logs                            []string
	agentsPort                      int
	agentsCA, agentsCert, agentsKey string
	output                          string
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
	f.etcd.add(s)
	s.StringVar(&f.at, "at", "", "the time in question: as 2026-11-28T12:03:04Z, as 12:03:04 of today, here, or as a duration, like 90s ago (default: now)")
	s.StringVar(&f.to, "to", "", "of connections to this address alone")
	s.StringVar(&f.protocol, "protocol", "", "of connections of this protocol alone: tcp, udp, icmp, icmpv6 ...")
	s.StringSliceVar(&f.logs, "log", nil, "search these files, in the order in which they were written, in place of asking; - is the standard input")
	s.IntVar(&f.agentsPort, "agents-port", 0, "port of the agents' --metrics-address, to ask those of other nodes; they name this certificate in --who-clients")
	s.StringVar(&f.agentsCA, "agents-ca-file", "", "file of the CA certificates that the agents' certificates are checked against")
	s.StringVar(&f.agentsCert, "agents-cert-file", "", "file of the certificate shown to agents")
	s.StringVar(&f.agentsKey, "agents-key-file", "", "file of that certificate's key")
	s.StringVarP(&f.output, "output", "o", "", "json or yaml (default: text)")
	c.RunE = configured(nil, func(c *cobra.Command, args []string) error { return f.run(c, args[0]) })
	return c
}

// question reads what is asked.
func (f *whoFlags) question(text string, now time.Time) (operator.WhoConfig, error) {
	cfg := operator.WhoConfig{Format: f.output, Protocol: f.protocol, Pages: [2]string{agent.ConnectionsPage, agent.LogPage}, Again: []string{"egret", "who", "'" + text + "'"}}
	at, err := netip.ParseAddrPort(text)
	if err != nil {
		return cfg, fmt.Errorf("%q: want an egress IP and a port, like 203.0.113.5:41012 or [2001:db8::5]:41012", text)
	}
	cfg.IP, cfg.Port = at.Addr().Unmap(), at.Port()
	if cfg.Port < egress.StatefulPort {
		return cfg, fmt.Errorf("port %d: no connection by an egress IP has a port below %d", cfg.Port, egress.StatefulPort)
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
	if cfg.Now = f.at == ""; !cfg.Now {
		cfg.Again = append(cfg.Again, "--at", cfg.From.UTC().Format(time.RFC3339Nano))
		if cfg.From.After(now.Add(time.Second)) {
			return cfg, fmt.Errorf("--at %s: that is in the future: it is %s", f.at, now.Format(time.RFC3339))
		}
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
	if err != nil {
		return err
	}
	if len(f.logs) > 0 {
		return f.search(c, cfg)
	}
	client, err := f.agents()
	if err != nil {
		return err
	}
	cfg.Ask = f.ask(client)
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

// agents returns the client of the agents of other nodes; nil: there is none.
func (f *whoFlags) agents() (*http.Client, error) {
	if f.agentsPort == 0 && f.agentsCA == "" && f.agentsCert == "" && f.agentsKey == "" {
		return nil, nil
	}
	if f.agentsPort < 1 || f.agentsPort > 65535 || f.agentsCA == "" || f.agentsCert == "" || f.agentsKey == "" {
		return nil, errors.New("--agents-port, --agents-ca-file, --agents-cert-file and --agents-key-file belong together: want all of them, and a port")
	}
	pair, err := tls.LoadX509KeyPair(f.agentsCert, f.agentsKey)
	if err != nil {
		return nil, fmt.Errorf("reading --agents-cert-file and --agents-key-file: %w", err)
	}
	roots, err := monitor.ReadCAs("--agents-ca-file", f.agentsCA)
	if err != nil {
		return nil, err
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, RootCAs: roots}
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: cfg}}, nil
}

// ask returns what asks agents: that of this node by its socket, others as the options say.
func (f *whoFlags) ask(others *http.Client) operator.Ask {
	here := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", agentSocket)
	}}}
	byName := operator.AskBy(func(_ context.Context, _ string, addresses []netip.Addr) (string, *http.Client) {
		if others == nil || len(addresses) == 0 {
			return "", nil
		}
		return "https://" + net.JoinHostPort(addresses[0].String(), strconv.Itoa(f.agentsPort)), others
	})
	bySocket := operator.AskBy(func(ctx context.Context, _ string, _ []netip.Addr) (string, *http.Client) {
		c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", agentSocket)
		if err != nil || os.Geteuid() != 0 {
			return "", nil // there is no agent here, or it answers root alone
		}
		c.Close()
		return "http://agent", here
	})
	return func(ctx context.Context, node string, addresses []netip.Addr, page string, q url.Values) (natlog.Reply, error) {
		r, err := bySocket(ctx, node, addresses, page, q)
		if err != nil && errors.Is(err, operator.ErrNoWay) {
			return byName(ctx, node, addresses, page, q)
		}
		return r, err
	}
}
