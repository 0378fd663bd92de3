// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package cli

import (
	"cmp"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/muster-vm/muster/api"
)

// authorityStatus is what the fake cluster says of its authority.
func (f *fakeCluster) authorityStatus() api.AuthorityStatus {
	now := time.Now()
	old, fresh := strings.Repeat("0a", 32), strings.Repeat("0b", 32)
	s := api.AuthorityStatus{
		Cluster: "prod", CertificateSeconds: cmp.Or(f.caLife, api.DefaultCertificateSeconds), Phase: f.caPhase, WaitingFor: []string{}, Away: []string{},
		Authorities: []api.Authority{{Fingerprint: old, Signs: true, NotAfter: now.AddDate(20, 0, 0), Cert: "-----OLD-----\n"}},
	}
	cert := &api.CertificateStatus{Serial: "1", NotAfter: now.Add(90 * 24 * time.Hour), RenewsAt: now.Add(60 * 24 * time.Hour), Signer: old, Trusts: []string{old}}
	if s.Phase != "" {
		began := now.Add(-time.Hour)
		s.StartedAt, s.Actor, s.Next = &began, "ann", "all nodes have renewed; give all clients the new file"
		s.Authorities = append([]api.Authority{{Fingerprint: fresh, Signs: true, NotAfter: now.AddDate(20, 0, 0), Cert: "-----NEW-----\n"}}, s.Authorities...)
		s.Authorities[1].Signs = false
		cert.Signer, cert.Trusts = fresh, []string{fresh, old}
	}
	s.Nodes = []api.NodeCertificate{{Node: "m1", Phase: api.NodeReady, Done: true, Certificate: cert}, {Node: "m2", Phase: api.NodeLost}}
	return s
}

// serveAuthority answers what is below cluster/ca. f.mu is held.
func (f *fakeCluster) serveAuthority(w http.ResponseWriter, r *http.Request, path string) {
	var err error
	switch r.Method + " " + path {
	case "GET cluster/ca":
	case "PATCH cluster/ca":
		var in api.AuthoritySettings
		if err = api.DecodeStrict(r.Body, &in); err == nil {
			f.caLife = in.CertificateSeconds
		}
	case "POST cluster/ca/rotate":
		var in api.RotateRequest
		if err = api.DecodeStrict(r.Body, &in); err != nil {
			break
		}
		switch {
		case in.Action == api.RotateStart && f.caPhase != "":
			err = api.Errorf(api.CodeRefused, "a rotation is under way already")
		case in.Action == api.RotateStart:
			f.caPhase = api.CARenew
		case in.Action == api.RotateFinish && !in.Force:
			err = api.Errorf(api.CodeRefused, "node m2 has not renewed")
		default:
			f.caPhase = ""
		}
	default:
		err = api.Errorf(api.CodeNotFound, "no such path")
	}
	if err != nil {
		f.fail(w, err)
		return
	}
	b, _ := json.Marshal(f.authorityStatus())
	f.send(w, 200, b)
}

// renewNode gives a node another certificate, which the fake does at once.
func (f *fakeCluster) renewNode(w http.ResponseWriter, o *fakeObject) {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := o.raw
	var n api.Node
	_ = json.Unmarshal(o.raw, &n)
	n.Status.Certificate = &api.CertificateStatus{Serial: "2f", NotAfter: time.Now().Add(90 * 24 * time.Hour), RenewsAt: time.Now().Add(60 * 24 * time.Hour), Signer: strings.Repeat("0a", 32), Trusts: []string{}}
	doc, _ := json.Marshal(n)
	if _, err := f.put(api.KindNode, doc, o); err != nil {
		f.fail(w, err)
		return
	}
	f.send(w, 202, before)
}
