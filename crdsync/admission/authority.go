package admission

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/egret-project/egret/crdsync/certificate"
)

const (
	// of type kubernetes.io/tls; its first certificate is the CA's, the others are of CAs before it
	secretName  = "egret-webhook-ca"
	caLife      = 10 * 365 * 24 * time.Hour
	servingLife = 30 * 24 * time.Hour
)

// authority is a CA: what signs, and what is trusted.
type authority struct {
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	bundle []byte // PEM
}

// newAuthority returns a CA; trusted are the certificates, in PEM, that stay trusted beside it.
func newAuthority(now time.Time, trusted []byte) (authority, error) {
	cert, key, err := certificate.New(&x509.Certificate{
		Subject: pkix.Name{CommonName: "egret webhook CA"}, NotBefore: now.Add(-certificate.Skew), NotAfter: now.Add(caLife), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}, nil, nil)
	if err != nil {
		return authority{}, err
	}
	return authority{cert, key, append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), trusted...)}, nil
}

// serve returns a certificate for a server of these names.
func (a authority) serve(now time.Time, names []string, ips []net.IP) (*tls.Certificate, error) {
	leaf, key, err := certificate.New(&x509.Certificate{
		Subject: pkix.Name{CommonName: names[0]}, DNSNames: names, IPAddresses: ips, NotBefore: now.Add(-certificate.Skew), NotAfter: now.Add(servingLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a.cert, a.key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

// secret returns the CA as the cluster keeps it.
func (a authority) secret() (map[string][]byte, error) {
	der, err := x509.MarshalECPrivateKey(a.key)
	if err != nil {
		return nil, fmt.Errorf("writing the CA's key: %w", err)
	}
	return map[string][]byte{
		corev1.TLSCertKey: a.bundle, corev1.TLSPrivateKeyKey: pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}),
	}, nil
}

func readAuthority(data map[string][]byte) (authority, error) {
	pair, err := tls.X509KeyPair(data[corev1.TLSCertKey], data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return authority{}, err
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return authority{}, errors.New("want an ECDSA key and the certificate of a CA")
	}
	return authority{pair.Leaf, key, data[corev1.TLSCertKey]}, nil
}

// loadAuthority returns the cluster's CA. It makes one when there is none, and a new one when the CA is due or cannot
// be read; the one before stays trusted, as other replicas still show its certificates. Of several replicas, one wins.
func loadAuthority(ctx context.Context, kube kubernetes.Interface, namespace string, now time.Time) (authority, error) {
	secrets := kube.CoreV1().Secrets(namespace)
	for {
		s, err := secrets.Get(ctx, secretName, metav1.GetOptions{})
		missing := apierrors.IsNotFound(err)
		if err != nil && !missing {
			return authority{}, fmt.Errorf("reading the webhook's CA: %w", err)
		}
		var trusted []byte
		if !missing {
			a, err := readAuthority(s.Data)
			if err == nil && !certificate.Due(a.cert, now) {
				return a, nil
			}
			if err == nil {
				trusted = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
			}
		}
		a, err := newAuthority(now, trusted)
		if err != nil {
			return authority{}, err
		}
		data, err := a.secret()
		if err != nil {
			return authority{}, err
		}
		if missing {
			s = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: secretName}, Type: corev1.SecretTypeTLS, Data: data}
			_, err = secrets.Create(ctx, s, metav1.CreateOptions{})
		} else {
			s.Data = data
			_, err = secrets.Update(ctx, s, metav1.UpdateOptions{})
		}
		switch {
		case err == nil:
			return a, nil
		case !apierrors.IsAlreadyExists(err) && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) || ctx.Err() != nil:
			return authority{}, fmt.Errorf("writing the webhook's CA: %w", err)
		}
	}
}

// publish writes the CA into the configuration that makes the API server ask us.
func (a authority) publish(ctx context.Context, kube kubernetes.Interface) error {
	configurations := kube.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	c, err := configurations.Get(ctx, Name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("reading the webhook's configuration: %w", err)
	}
	differs := false
	for i, w := range c.Webhooks {
		differs = differs || !bytes.Equal(w.ClientConfig.CABundle, a.bundle)
		c.Webhooks[i].ClientConfig.CABundle = a.bundle
	}
	if !differs {
		return nil
	}
	if _, err := configurations.Update(ctx, c, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("writing the caBundle of the webhook: %w", err)
	}
	return nil
}
