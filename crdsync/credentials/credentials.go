package credentials

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	etcdCA       = "egret-etcd-ca"
	metricsCA    = "egret-metrics-ca"
	gossipSecret = "egret-gossip"
	// retry is how soon a pass that failed is tried again, and interval how often the Secrets are looked at: one that
	// was deleted is back then.
	retry    = 5 * time.Second
	interval = time.Minute
)

// Common names of the certificates: the names of etcd's users.
const (
	Member   = "egret-etcd"
	Agent    = "egret-agent"
	Crdsync  = "egret-crdsync"
	Cloud    = "egret-cloud"
	Operator = "egret-operator"
	Root     = "root"
	// Reader may read metrics, and is no user of etcd.
	Reader = "egret-metrics-reader"
)

// OperatorSecret has the certificate by which etcd knows operators, and the CA of etcd's own.
const OperatorSecret = "egret-etcd-operator"

// Config is what Run needs.
type Config struct {
	Kube      kubernetes.Interface
	Namespace string
	// Etcd says to keep the certificates of Egret's own etcd and of its clients; Metrics, those by which agents and
	// crdsync tell others of themselves. The gossip's key is kept in any case.
	Etcd, Metrics bool
	// Service is the Service of etcd's members, Peers the headless one that names each of them.
	Service, Peers string
	Log            *slog.Logger
}

// ServerName is the name that a member of etcd proves to its clients, whatever address they dial.
func (c *Config) ServerName() string { return c.Service + "." + c.Namespace + ".svc" }

// AgentName is the name that an agent proves to who asks it for its metrics, whichever node it is of: all have one
// certificate, as all have one Secret.
func (c *Config) AgentName() string { return "egret-agent." + c.Namespace + ".svc" }

// CrdsyncName is that of crdsync.
func (c *Config) CrdsyncName() string { return "egret-crdsync." + c.Namespace + ".svc" }

// set is a CA, and what it signs.
type set struct {
	of, ca   string // what it is the CA of, and the Secret of the CA
	subjects []subject
}

// sets returns the CAs. They are apart: who has a certificate of that of etcd is a client of etcd, and who has one of
// that of metrics reads metrics and nothing else.
func (c *Config) sets() (out []set) {
	peers := c.Peers + "." + c.Namespace + ".svc"
	client, server := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	both := slices.Concat(client, server)
	if c.Etcd {
		out = append(out, set{"etcd", etcdCA, []subject{
			// Members are each other's clients.
			{secret: "egret-etcd-server", name: Member, uses: both, dns: []string{c.ServerName(), "*." + peers, "localhost"}, ips: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}},
			{secret: "egret-etcd-agent", name: Agent, uses: client},
			{secret: "egret-etcd-crdsync", name: Crdsync, uses: client},
			{secret: "egret-etcd-cloud", name: Cloud, uses: client},
			{secret: OperatorSecret, name: Operator, uses: client},
			{secret: "egret-etcd-root", name: Root, uses: client},
		}})
	}
	if c.Metrics {
		out = append(out, set{"metrics", metricsCA, []subject{
			// Who breaks into an agent reads no metrics of others by it.
			{secret: "egret-metrics-agent", name: Agent, uses: server, dns: []string{c.AgentName()}},
			// crdsync asks agents, and is asked itself.
			{secret: "egret-metrics-crdsync", name: Crdsync, uses: both, dns: []string{c.CrdsyncName()}},
			{secret: "egret-metrics-reader", name: Reader, uses: client},
			// Who asks what single pods do (--who-clients), which is told to fewer.
			{secret: "egret-metrics-operator", name: Operator, uses: client},
		}})
	}
	return out
}

// Run keeps the Secrets until ctx ends.
func Run(ctx context.Context, cfg Config) error {
	for said := ""; ; {
		wait := interval
		if err := Once(ctx, cfg, time.Now()); err != nil && ctx.Err() == nil {
			wait = retry
			if said != err.Error() {
				said = err.Error()
				cfg.Log.Error("cannot keep the secrets, will retry", "err", err)
			}
		} else {
			said = ""
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// Once makes what is missing or due. It goes on after an error, and can be run again, also by several at a time.
func Once(ctx context.Context, cfg Config, now time.Time) error {
	return cfg.pass(now, func(name string, kind corev1.SecretType, change change) error {
		return cfg.keep(ctx, name, kind, change)
	})
}

// change returns what the content of a Secret, nil where there is none, is to be, and whether that is something else.
type change func(have map[string][]byte) (map[string][]byte, bool, error)

func (c *Config) pass(now time.Time, keep func(name string, kind corev1.SecretType, change change) error) error {
	errs := []error{keep(gossipSecret, corev1.SecretTypeOpaque, func(have map[string][]byte) (map[string][]byte, bool, error) {
		if have != nil { // a person may replace it (docs/install.md)
			return have, false, nil
		}
		key := make([]byte, 32)
		_, _ = rand.Read(key) // never fails
		return map[string][]byte{"key": []byte(base64.StdEncoding.EncodeToString(key))}, true, nil
	})}
	for _, s := range c.sets() {
		errs = append(errs, s.pass(now, keep))
	}
	return errors.Join(errs...)
}

// pass makes what is missing or due of a CA, and of what it signs.
func (s set) pass(now time.Time, keep func(name string, kind corev1.SecretType, change change) error) error {
	var a authority
	err := keep(s.ca, corev1.SecretTypeTLS, func(have map[string][]byte) (map[string][]byte, bool, error) {
		a = authority{name: s.of}
		var err error
		if have != nil {
			if a, err = readAuthority(s.of, have); err != nil {
				return nil, false, fmt.Errorf("reading the CA: %w: what it signed is in use; to begin with a new one, delete it", err)
			}
		} else if a.old, err = s.trusted(now, keep); err != nil {
			return nil, false, err
		}
		changed, err := a.advance(now)
		if err != nil || !changed {
			return have, false, err
		}
		data, err := a.data()
		return data, true, err
	})
	if err != nil {
		return err // without a CA nothing is signed
	}
	var errs []error
	for _, of := range s.subjects {
		errs = append(errs, keep(of.secret, corev1.SecretTypeTLS, func(have map[string][]byte) (map[string][]byte, bool, error) {
			return a.issue(of, have, now)
		}))
	}
	return errors.Join(errs...)
}

// trusted returns the CAs by which what is there is trusted, where the Secret of the CA is gone: what they signed is in
// use.
func (s set) trusted(now time.Time, keep func(name string, kind corev1.SecretType, change change) error) (list []*x509.Certificate, err error) {
	var errs []error
	for _, of := range s.subjects {
		errs = append(errs, keep(of.secret, corev1.SecretTypeTLS, func(have map[string][]byte) (map[string][]byte, bool, error) {
			for rest := have["ca.crt"]; ; {
				var block *pem.Block
				if block, rest = pem.Decode(rest); block == nil {
					return have, false, nil
				}
				c, err := x509.ParseCertificate(block.Bytes)
				if err == nil && c.IsCA && now.Before(c.NotAfter) && !slices.ContainsFunc(list, c.Equal) {
					list = append(list, c)
				}
			}
		}))
	}
	return list, errors.Join(errs...)
}

// keep reads a Secret and writes what change makes of it, nil where there is none. Of several writers one wins, and the
// others look again.
func (c *Config) keep(ctx context.Context, name string, kind corev1.SecretType, change change) error {
	secrets := c.Kube.CoreV1().Secrets(c.Namespace)
	for {
		s, err := secrets.Get(ctx, name, metav1.GetOptions{})
		missing := apierrors.IsNotFound(err)
		if err != nil && !missing {
			return fmt.Errorf("reading Secret %s/%s: %w", c.Namespace, name, err)
		}
		var have map[string][]byte
		if !missing {
			have = map[string][]byte{}
			maps.Copy(have, s.Data)
		}
		data, changed, err := change(have)
		if err != nil {
			return fmt.Errorf("keeping Secret %s/%s: %w", c.Namespace, name, err)
		}
		if !changed {
			return nil
		}
		if missing {
			s = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Type: kind, Data: data}
			_, err = secrets.Create(ctx, s, metav1.CreateOptions{})
		} else {
			s.Data = data
			_, err = secrets.Update(ctx, s, metav1.UpdateOptions{})
		}
		switch {
		case err == nil:
			c.Log.Info("wrote a secret", "secret", name)
			return nil
		case !apierrors.IsAlreadyExists(err) && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) || ctx.Err() != nil:
			return fmt.Errorf("writing Secret %s/%s: %w", c.Namespace, name, err)
		}
		if missing && apierrors.IsNotFound(err) {
			return fmt.Errorf("writing Secret %s/%s: %w", c.Namespace, name, err) // there is no such namespace
		}
	}
}
