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

	"github.com/spf13/pflag"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/page"
)

// agentSocket is where the agent of this node is asked; tests have one of their own.
var agentSocket = agent.Socket

// agentsFlags say how agents are asked what their records in etcd do not tell.
type agentsFlags struct {
	port          int
	ca, cert, key string
}

func (f *agentsFlags) add(s *pflag.FlagSet) {
	s.IntVar(&f.port, "agents-port", 0, "port of the agents' --metrics-address, to ask those of other nodes; for more than traffic they name this certificate in --who-clients")
	s.StringVar(&f.ca, "agents-ca-file", "", "file of the CA certificates that the agents' certificates are checked against")
	s.StringVar(&f.cert, "agents-cert-file", "", "file of the certificate shown to agents")
	s.StringVar(&f.key, "agents-key-file", "", "file of that certificate's key")
}

// client returns the client of the agents of other nodes; nil: there is none.
func (f *agentsFlags) client() (*http.Client, error) {
	if f.port == 0 && f.ca == "" && f.cert == "" && f.key == "" {
		return nil, nil
	}
	if f.port < 1 || f.port > 65535 || f.ca == "" || f.cert == "" || f.key == "" {
		return nil, errors.New("--agents-port, --agents-ca-file, --agents-cert-file and --agents-key-file belong together: want all of them, and a port")
	}
	pair, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return nil, fmt.Errorf("reading --agents-cert-file and --agents-key-file: %w", err)
	}
	roots, err := monitor.ReadCAs("--agents-ca-file", f.ca)
	if err != nil {
		return nil, err
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		// Read again, as what runs for long outlives it; the last one where it cannot be read while it is replaced.
		if now, err := tls.LoadX509KeyPair(f.cert, f.key); err == nil {
			return &now, nil
		}
		return &pair, nil
	}}
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: cfg}, CheckRedirect: stay}, nil
}

// stay follows no agent to somewhere else: who broke into one would have others ask what he cannot reach, and show him the answers.
func stay(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// maxTrafficAnswer is how much of an agent's answer about traffic is read, in bytes: more than egress.MaxTraffic IPs take.
const maxTrafficAnswer = 256 << 10

// traffic returns what asks agents for traffic; nil: the options say of none.
func (f *agentsFlags) traffic() (page.AskTraffic, error) {
	others, err := f.client()
	if others == nil || err != nil {
		return nil, err
	}
	others.Transport = limited{others.Transport, maxTrafficAnswer}
	ask := f.askByName(others)
	return func(ctx context.Context, node string, addresses []netip.Addr) (map[netip.Addr]egress.Traffic, error) {
		var answer egress.NodeTraffic
		err := ask(ctx, node, addresses, agent.TrafficPage, url.Values{}, &answer)
		return answer.IPs, err
	}, nil
}

// limited reads so many bytes of an answer at most: crdsync is to bear what a node may say.
type limited struct {
	http.RoundTripper
	most int64
}

func (l limited) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, l.most), resp.Body}
	}
	return resp, err
}

// askByName returns what asks the agents of nodes at their addresses; others may be nil.
func (f *agentsFlags) askByName(others *http.Client) operator.Ask {
	return operator.AskBy(func(_ context.Context, _ string, addresses []netip.Addr) (string, *http.Client) {
		if others == nil || len(addresses) == 0 {
			return "", nil
		}
		return "https://" + net.JoinHostPort(addresses[0].String(), strconv.Itoa(f.port)), others
	})
}

// ask returns what asks agents: that of this node by its socket, others as the options say.
func (f *agentsFlags) ask() (operator.Ask, error) {
	others, err := f.client()
	if err != nil {
		return nil, err
	}
	here := &http.Client{CheckRedirect: stay, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", agentSocket)
	}}}
	byName := f.askByName(others)
	bySocket := operator.AskBy(func(ctx context.Context, _ string, _ []netip.Addr) (string, *http.Client) {
		c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", agentSocket)
		if err != nil || os.Geteuid() != 0 {
			return "", nil // there is no agent here, or it answers root alone
		}
		c.Close()
		return "http://agent", here
	})
	return func(ctx context.Context, node string, addresses []netip.Addr, page string, q url.Values, reply any) error {
		err := bySocket(ctx, node, addresses, page, q, reply)
		if err != nil && errors.Is(err, operator.ErrNoWay) {
			return byName(ctx, node, addresses, page, q, reply)
		}
		return err
	}, nil
}
