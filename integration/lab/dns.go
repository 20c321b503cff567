package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// dnsPort is the cluster's DNS server's, at ControlIP. It knows Services and the pods of headless ones, as the DNS
// specification of Kubernetes has them, and no other name.
const (
	dnsPort       = 53
	clusterDomain = "cluster.local"
	dnsTTL        = 5 // seconds
	dnsPatience   = 5 * time.Second
)

// serveDNS starts the server on the control host.
func (l *Lab) serveDNS(ctx context.Context, g *errgroup.Group) error {
	at := netip.AddrPortFrom(ControlIP, dnsPort)
	return inNetns(l.netns(control.name), func() error {
		udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return fmt.Errorf("starting the DNS server: %w", err)
		}
		tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		if err != nil {
			return fmt.Errorf("starting the DNS server: %w", err)
		}
		// who asked asks again
		answer := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { _ = w.WriteMsg(l.answerDNS(ctx, q)) })
		for _, s := range []*dns.Server{{PacketConn: udp, Handler: answer}, {Listener: tcp, Handler: answer}} {
			g.Go(s.ActivateAndServe)
			context.AfterFunc(ctx, func() { _ = s.Shutdown() })
		}
		return nil
	})
}

// answerDNS answers one question by what the API server has now.
func (l *Lab) answerDNS(ctx context.Context, q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	if len(q.Question) != 1 {
		return m.SetRcode(q, dns.RcodeFormatError)
	}
	asked := q.Question[0]
	name, ok := strings.CutSuffix(strings.ToLower(asked.Name), ".svc."+clusterDomain+".")
	labels := strings.Split(name, ".")
	if !ok || len(labels) < 2 || len(labels) > 3 {
		return m.SetRcode(q, dns.RcodeNameError)
	}
	ctx, cancel := context.WithTimeout(ctx, dnsPatience)
	defer cancel()
	namespace, service := labels[len(labels)-1], labels[len(labels)-2]
	addresses, err := l.serviceAddresses(ctx, namespace, service, labels[0], len(labels) == 3)
	if err != nil {
		fmt.Fprintf(os.Stderr, "answering a question for %s: %v\n", asked.Name, err)
		return m.SetRcode(q, dns.RcodeServerFailure)
	}
	if len(addresses) == 0 {
		return m.SetRcode(q, dns.RcodeNameError)
	}
	m.Authoritative = true
	for _, a := range addresses {
		header := dns.RR_Header{Name: asked.Name, Class: dns.ClassINET, Ttl: dnsTTL}
		switch {
		case a.Is4() && asked.Qtype == dns.TypeA:
			header.Rrtype = dns.TypeA
			m.Answer = append(m.Answer, &dns.A{Hdr: header, A: a.AsSlice()})
		case a.Is6() && asked.Qtype == dns.TypeAAAA:
			header.Rrtype = dns.TypeAAAA
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: header, AAAA: a.AsSlice()})
		}
	}
	return m
}

// serviceAddresses returns those of a Service, or of its pods that have a name: none where there is no such thing.
func (l *Lab) serviceAddresses(ctx context.Context, namespace, service, pod string, ofPod bool) (out []netip.Addr, err error) {
	add := func(text string) {
		if a, err := netip.ParseAddr(text); err == nil && !slices.Contains(out, a) { // a headless Service's is "None"
			out = append(out, a)
		}
	}
	err = l.kube(func(c *kubernetes.Clientset) error {
		s, err := c.CoreV1().Services(namespace).Get(ctx, service, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if !ofPod {
			for _, a := range s.Spec.ClusterIPs {
				add(a)
			}
			if s.Spec.ClusterIP != "None" {
				return nil
			}
		}
		all, err := c.DiscoveryV1().EndpointSlices(namespace).List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + service})
		if err != nil {
			return err
		}
		for _, slice := range all.Items {
			for _, e := range slice.Endpoints {
				if ofPod && (e.Hostname == nil || *e.Hostname != pod) || e.Conditions.Ready != nil && !*e.Conditions.Ready {
					continue
				}
				for _, a := range e.Addresses {
					add(a)
				}
			}
		}
		return nil
	})
	return out, err
}
