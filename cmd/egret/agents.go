package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/operator"
)

// agentSocket is where the agent of this node is asked; tests have one of their own.
var agentSocket = agent.Socket

// agentsFlags say how agents are asked what their records in etcd do not tell.
type agentsFlags struct {
	port  int
	files monitor.ClientTLS
}

func (f *agentsFlags) add(s *pflag.FlagSet) {
	s.IntVar(&f.port, "agents-port", 0, "port of the agents' --metrics-address, to ask those of other nodes; for more than traffic they name this certificate in --who-clients, for traces alone in --trace-clients")
	s.StringVar(&f.files.CA, "agents-ca-file", "", "file of the CA certificates that the agents' certificates are checked against")
	s.StringVar(&f.files.Cert, "agents-cert-file", "", "file of the certificate shown to agents")
	s.StringVar(&f.files.Key, "agents-key-file", "", "file of that certificate's key")
	s.StringVar(&f.files.ServerName, "agents-server-name", "",
		"DNS name that the certificates of all agents are for, where they are not for the addresses of their nodes")
}

// client returns the client of the agents of other nodes; nil: there is none. log may be nil.
func (f *agentsFlags) client(log *slog.Logger) (*http.Client, error) {
	if *f == (agentsFlags{}) {
		return nil, nil
	}
	if f.port < 1 || f.port > 65535 || f.files.CA == "" || f.files.Cert == "" || f.files.Key == "" {
		return nil, errors.New("--agents-port, --agents-ca-file, --agents-cert-file and --agents-key-file belong together: want all of them, and a port")
	}
	if name := f.files.ServerName; name != "" && len(validation.IsDNS1123Subdomain(name)) > 0 {
		return nil, fmt.Errorf("--agents-server-name %q: want a DNS name, like egret-agent.egret-system.svc", name)
	}
	files := f.files
	files.Options, files.Log = "agents", log
	dial, err := files.Dial()
	if err != nil {
		return nil, err
	}
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialTLSContext: dial}, CheckRedirect: stay}, nil
}

// stay follows no agent to somewhere else: who broke into one would have others ask what he cannot reach, and show him
// the answers.
func stay(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// askByName returns what asks the agents of nodes at their addresses; others may be nil.
func (f *agentsFlags) askByName(others *http.Client) operator.Ask {
	return operator.AskBy(func(_ context.Context, _ string, addresses []netip.Addr) (string, *http.Client) {
		if others == nil || len(addresses) == 0 {
			return "", nil
		}
		return "https://" + net.JoinHostPort(addresses[0].String(), strconv.Itoa(f.port)), others
	})
}

// dialAgent connects to the agent of this node. A process that is not root's may have taken the name of the socket while
// there was no agent, and would say what it likes.
func dialAgent(ctx context.Context) (net.Conn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", agentSocket)
	if err != nil {
		return nil, err
	}
	who, err := monitor.Peer(c)
	if err == nil && who.Uid != 0 {
		err = fmt.Errorf("%s is of user %d, and no agent's", agentSocket, who.Uid)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// ask returns what asks agents: that of this node by its socket, others as the options say.
func (f *agentsFlags) ask() (operator.Ask, error) {
	others, err := f.client(nil)
	if err != nil {
		return nil, err
	}
	here := &http.Client{CheckRedirect: stay, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialAgent(ctx)
	}}}
	byName := f.askByName(others)
	bySocket := operator.AskBy(func(ctx context.Context, _ string, _ []netip.Addr) (string, *http.Client) {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		c, err := dialAgent(ctx)
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
