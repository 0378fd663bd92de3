// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package powersim

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
)

// Redfish is a service on a port of loopback.
type Redfish struct {
	Port int
	// CACert and Fingerprint are what a client trusts it by.
	CACert, Fingerprint string
	srv                 *httptest.Server
	c                   RedfishConfig
	requests            atomic.Int64
}

// Requests is how many came.
func (r *Redfish) Requests() int { return int(r.requests.Load()) }

// RedfishConfig describes a service (DMTF DSP0266, DSP0268 ComputerSystem).
type RedfishConfig struct {
	Host           *Host
	User, Password string
	// Systems by ID, with their UUIDs; the first one, in order, is Host.
	Systems map[string]string
	// Link, if set, is where the collection says that the first system is.
	Link string
}

const systemsPath = "/redfish/v1/Systems"

// NewRedfish starts a service.
func NewRedfish(c RedfishConfig) (*Redfish, error) {
	if len(c.Systems) == 0 {
		c.Systems = map[string]string{"1": ""}
	}
	r := &Redfish{c: c}
	r.srv = httptest.NewTLSServer(http.HandlerFunc(r.serve))
	u, err := url.Parse(r.srv.URL)
	if err != nil {
		return nil, err
	}
	if r.Port, err = strconv.Atoi(u.Port()); err != nil {
		return nil, err
	}
	raw := r.srv.Certificate().Raw
	sum := sha256.Sum256(raw)
	r.Fingerprint = hex.EncodeToString(sum[:])
	r.CACert = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw}))
	return r, nil
}

// Close ends the service.
func (r *Redfish) Close() {
	r.srv.CloseClientConnections()
	r.srv.Close()
}

func (r *Redfish) ids() []string {
	var out []string
	for id := range r.c.Systems {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}

func (r *Redfish) serve(w http.ResponseWriter, q *http.Request) {
	r.requests.Add(1)
	m := r.c.Host.Mood()
	if m.Deaf {
		<-q.Context().Done()
		return
	}
	if m.Late > 0 {
		time.Sleep(m.Late)
	}
	if q.URL.Path == "/redfish/v1" || q.URL.Path == "/redfish/v1/" { // open to everybody
		answer(w, http.StatusOK, map[string]any{
			"@odata.id": "/redfish/v1", "@odata.type": "#ServiceRoot.v1_15_0.ServiceRoot", "Id": "RootService", "Name": "Root Service", "RedfishVersion": "1.15.0",
			"Systems": link(systemsPath), "Links": map[string]any{"Sessions": link("/redfish/v1/SessionService/Sessions")},
		})
		return
	}
	if user, password, ok := q.BasicAuth(); !ok || user != r.c.User || password != r.c.Password {
		problem(w, http.StatusUnauthorized, "Base.1.8.NoValidSession", "there is no login "+user+":"+password)
		return
	}
	if q.URL.Path == systemsPath {
		var members []any
		for i, id := range r.ids() {
			path := systemsPath + "/" + id
			if i == 0 && r.c.Link != "" {
				path = r.c.Link
			}
			members = append(members, link(path))
		}
		answer(w, http.StatusOK, map[string]any{
			"@odata.id": systemsPath, "@odata.type": "#ComputerSystemCollection.ComputerSystemCollection", "Name": "Systems",
			"Members@odata.count": len(members), "Members": members,
		})
		return
	}
	for i, id := range r.ids() {
		switch q.URL.Path {
		case systemsPath + "/" + id:
			r.system(w, i, id)
			return
		case systemsPath + "/" + id + "/Actions/ComputerSystem.Reset":
			r.reset(w, q, i)
			return
		}
	}
	problem(w, http.StatusNotFound, "Base.1.8.ResourceMissingAtURI", "there is nothing here")
}

func (r *Redfish) system(w http.ResponseWriter, i int, id string) {
	state := "On"
	if i == 0 && !r.c.Host.read() {
		state = "Off"
	}
	path := systemsPath + "/" + id
	s := map[string]any{
		"@odata.id": path, "@odata.type": "#ComputerSystem.v1_20_0.ComputerSystem", "Id": id, "Name": "System " + id, "PowerState": state,
		"Actions": map[string]any{"#ComputerSystem.Reset": map[string]any{
			"target": path + "/Actions/ComputerSystem.Reset", "ResetType@Redfish.AllowableValues": []string{"On", "ForceOff", "GracefulShutdown"},
		}},
	}
	if u := r.c.Systems[id]; u != "" {
		s["UUID"] = u
	}
	answer(w, http.StatusOK, s)
}

func (r *Redfish) reset(w http.ResponseWriter, q *http.Request, i int) {
	var body struct{ ResetType string }
	if err := json.NewDecoder(q.Body).Decode(&body); err != nil || q.Method != http.MethodPost {
		problem(w, http.StatusBadRequest, "Base.1.8.MalformedJSON", "POST a ResetType")
		return
	}
	word := map[string]string{"On": "on", "ForceOff": "off"}[body.ResetType]
	switch {
	case word == "":
		problem(w, http.StatusBadRequest, "Base.1.8.ActionParameterNotSupported", fmt.Sprintf("ResetType %q is not supported", body.ResetType))
	case i == 0 && r.c.Host.On() == (word == "on"):
		problem(w, http.StatusConflict, "Base.1.8.NoOperation", "the system is in that state already")
	case i == 0 && !r.c.Host.command(word):
		problem(w, http.StatusInternalServerError, "Base.1.8.InternalError", "power fault")
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

func link(path string) map[string]any { return map[string]any{"@odata.id": path} }

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("OData-Version", "4.0")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // a client that went away is no concern
}

func problem(w http.ResponseWriter, status int, id, text string) {
	answer(w, status, map[string]any{"error": map[string]any{"code": id, "message": text}})
}
