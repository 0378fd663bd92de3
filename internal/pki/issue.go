// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package pki

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"net"
	"strings"
	"time"
)

// Terms are what a node's certificate says, decided by the cluster.
type Terms struct {
	NodeID, Name string
	// Host is the address or host name that others reach the node at; may be empty.
	Host string
	// NotBefore and NotAfter are the life; the end is cut to the authority's.
	NotBefore, NotAfter time.Time
	// At is when it is issued: an authority that has ended by then signs nothing.
	At time.Time
}

// TermsFrom returns terms that last life from now, and begin earlier, for clocks that
// are late.
func TermsFrom(now time.Time, life time.Duration, nodeID, name, host string) Terms {
	return Terms{NodeID: nodeID, Name: name, Host: host, NotBefore: now.Add(-skewOf(life)), NotAfter: now.Add(life), At: now}
}

// skewOf is how far before its issue a certificate begins that lasts life from then.
func skewOf(life time.Duration) time.Duration {
	return min(life, skewWithin(life/10))
}

func skewWithin(part time.Duration) time.Duration { return max(leastSkew, min(clockSkew, part)) }

// SignNode issues a node's certificate with the default life for the public key
// of a request, from which it takes nothing else.
func SignNode(caCertPEM, caKeyPEM []byte, csr *x509.CertificateRequest, nodeID, name, host string) ([]byte, error) {
	return Issue(caCertPEM, caKeyPEM, csr.PublicKey, TermsFrom(time.Now(), NodeCertLife, nodeID, name, host))
}

// Issue signs a node's certificate. Only what the caller decided is in it.
// Neither name nor host may look like a node's ID name: its holder could pose as
// that node.
func Issue(caCertPEM, caKeyPEM []byte, pub any, t Terms) ([]byte, error) {
	for _, n := range []string{t.Name, t.Host} {
		if strings.HasSuffix(strings.ToLower(strings.TrimRight(n, ".")), nodeDomain) {
			return nil, fmt.Errorf("sign certificate of node %s: %q is reserved", t.Name, n)
		}
	}
	ca, err := ParseCert(caCertPEM)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	key, err := parseKey(caKeyPEM)
	if err != nil {
		return nil, fmt.Errorf("authority: %w", err)
	}
	if t.NotAfter.After(ca.NotAfter) {
		t.NotAfter = ca.NotAfter
	}
	if !t.NotBefore.Before(t.NotAfter) || !t.At.Before(t.NotAfter) {
		return nil, fmt.Errorf("sign certificate of node %s: the authority ended on %s; replace it with: muster cluster ca rotate", t.Name, ca.NotAfter.UTC().Format(time.DateOnly))
	}
	c := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: t.Name},
		NotBefore:    t.NotBefore,
		NotAfter:     t.NotAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:     []string{NodeDNSName(t.NodeID), t.Name, "localhost"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	if ip := net.ParseIP(t.Host); ip != nil {
		c.IPAddresses = append(c.IPAddresses, ip)
	} else if t.Host != "" {
		c.DNSNames = append(c.DNSNames, t.Host)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, ca, pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of node %s: %w", t.Name, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// Serial is a certificate's serial number in hexadecimal.
func Serial(c *x509.Certificate) string { return fmt.Sprintf("%x", c.SerialNumber) }

// RenewAt is when a node's certificate is to be renewed: after two thirds of
// its life, give or take a thirtieth. Which, follows from the serial number, so
// that nodes of one age come one after the other and a restart changes nothing.
func RenewAt(c *x509.Certificate) time.Time {
	var tail [8]byte
	b := c.SerialNumber.Bytes()
	copy(tail[:], b[max(0, len(b)-len(tail)):])
	const steps = 1 << 16
	spread := float64(binary.BigEndian.Uint64(tail[:])%steps)/steps*2 - 1 // -1 to 1
	life := c.NotAfter.Sub(begin(c))
	return begin(c).Add(time.Duration(float64(life) * (2.0/3 + spread/30)))
}

// begin is when a certificate was issued: NotBefore lies earlier, by skewOf its life.
func begin(c *x509.Certificate) time.Time {
	whole := c.NotAfter.Sub(c.NotBefore)
	return c.NotBefore.Add(min(whole/2, skewWithin(whole/11)))
}

// Life is how long a certificate was to last when it was issued.
func Life(c *x509.Certificate) time.Duration { return c.NotAfter.Sub(begin(c)) }
