package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/page"
)

// maxTrafficAnswer is how much of an agent's answer about traffic is read, in bytes: more than egress.MaxTraffic IPs
// take. maxKernelAnswer is that about a kernel, of which the lines are as long as what the kernel lacks.
const maxTrafficAnswer, maxKernelAnswer = 256 << 10, 1 << 20

// forPage returns how the status page asks agents; the zero Agents: the options say of none.
func (f *agentsFlags) forPage(log *slog.Logger) (page.Agents, error) {
	others, err := f.client(log)
	if others == nil || err != nil {
		return page.Agents{}, err
	}
	traffic := f.inWords(others, maxTrafficAnswer)
	return page.Agents{
		Traffic: func(ctx context.Context, node string, addresses []netip.Addr) (answer egress.NodeTraffic, err error) {
			err = traffic(ctx, node, addresses, agent.TrafficPage, url.Values{}, &answer)
			return answer, err
		},
		Kernels: operator.Kernels{Ask: f.inWords(others, maxKernelAnswer), Page: agent.KernelPage},
	}, nil
}

// inWords returns what asks the agents of nodes, and reads so much of their answers at most. Its errors are for who
// looks at the page: they say what is so of the agent, and who is to look at what.
func (f *agentsFlags) inWords(others *http.Client, most int64) operator.Ask {
	bounded := *others
	bounded.Transport = limited{others.Transport, most}
	ask := f.askByName(&bounded)
	return func(ctx context.Context, node string, addresses []netip.Addr, page string, q url.Values, reply any) error {
		if len(addresses) == 0 {
			return fmt.Errorf("node %s has no address in its record, at which its agent could be asked", node)
		}
		err := ask(ctx, node, addresses, page, q, reply)
		if err != nil {
			err = f.plain(err, node, addresses[0])
		}
		return err
	}
}

// plain says in words why an agent was not heard, with the program's own after it where those may help who mends it.
func (f *agentsFlags) plain(err error, node string, address netip.Addr) error {
	at := net.JoinHostPort(address.String(), strconv.Itoa(f.port))
	var certificate *tls.CertificateVerificationError
	var remote *net.OpError
	var slow net.Error
	switch {
	case errors.Is(err, operator.ErrNoWay):
		// no ErrNoWay any more, of which traces do not tell
		return fmt.Errorf("another node's agent answers at %s, which is node %s by its record: %s", at, node, err)
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &slow) && slow.Timeout():
		return fmt.Errorf("the agent of node %s does not answer at %s: the node is down, a firewall is between, or it is busy", node, at)
	case errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("nobody answers at %s: the agent of node %s is down, or has no --metrics-address there", at, node)
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return fmt.Errorf("node %s is not reached at %s", node, at)
	case errors.As(err, &certificate):
		return fmt.Errorf("whoever answers at %s does not prove that it is the agent of node %s (%w): its --metrics-cert-file is to be of a CA of "+
			"--agents-ca-file, and for %s", at, node, certificate.Err, f.provenName(address))
	case errors.As(err, &remote) && remote.Op == "remote error":
		return fmt.Errorf("the agent of node %s does not take the certificate of --agents-cert-file (%w): its --metrics-client-ca-file is of another CA", node, remote.Err)
	}
	return err
}

// provenName is what an agent's certificate has to be for.
func (f *agentsFlags) provenName(address netip.Addr) string {
	if f.files.ServerName != "" {
		return f.files.ServerName + " (--agents-server-name)"
	}
	return address.String() + ", unless --agents-server-name says another name"
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
