// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package rest

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/muster-vm/muster/api"
	"github.com/muster-vm/muster/configdb"
)

type imageReply struct {
	Task   api.Task  `json:"task"`
	Object api.Image `json:"object"`
}

func TestImageUpload(t *testing.T) {
	f := newFixture(t)
	r := want[imageReply](t, f.do(call{method: "POST", path: "images", body: `{"meta":{"name":"deb"}}`, role: api.RoleOperator}), 202)
	if r.Object.Spec.Pool != "local" || r.Object.Spec.Node != "m1" || r.Object.Status.Phase != api.StoragePending || r.Task.Spec.Action != api.ActionImageCreate {
		t.Fatalf("%+v", r)
	}
	content := strings.Repeat("muster", 100_000)
	sum := sha256.Sum256([]byte(content))
	wantProblem(t, f.do(call{method: "PUT", path: "images/deb/content?sha256=zz", body: content}), 422, api.CodeInvalid, "sha256")
	wantProblem(t, f.do(call{method: "PUT", path: "images/deb/content?sha256=" + strings.Repeat("0", 64), body: content}), 422, api.CodeChecksum, "")
	// Through the other node, chunked, with the right sum.
	put := call{method: "PUT", path: "images/deb/content?sha256=" + hex.EncodeToString(sum[:]), body: io.MultiReader(strings.NewReader(content)), node: "m2", role: api.RoleOperator}
	a := f.do(put)
	img := want[api.Image](t, a, 200)
	if img.Status.Phase != api.StorageReady || int(img.Status.Size) != len(content) || f.images.got[img.Meta.ID] != "m1" || a.header.Get(headerNode) != "m1" {
		t.Errorf("%+v, stored by %s, answered by %s", img, f.images.got[img.Meta.ID], a.header.Get(headerNode))
	}
	if len(a.header.Values(headerNode)) != 1 || len(a.header.Values(headerRevision)) != 1 {
		t.Errorf("headers twice: %v", a.header)
	}
	wantProblem(t, f.do(call{method: "PUT", path: "images/deb/content", body: "again"}), 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "PUT", path: "images/nope/content", body: "x"}), 404, api.CodeNotFound, "")
}

func TestUploadThatEndsEarly(t *testing.T) {
	f := newFixture(t)
	want[any](t, f.do(call{method: "POST", path: "images", body: `{"meta":{"name":"deb"}}`}), 202)
	for _, tt := range []struct{ name, node, head string }{
		{"with a length", "m1", "Content-Length: 1000\r\n"},
		{"chunked", "m1", "Transfer-Encoding: chunked\r\n"},
		{"with a length through another node", "m2", "Content-Length: 1000\r\n"},
		{"chunked through another node", "m2", "Transfer-Encoding: chunked\r\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := net.Dial("tcp", strings.TrimPrefix(f.urls[tt.node], "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
			fmt.Fprintf(c, "PUT %simages/deb/content HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n%s\r\n5\r\nhello\r\n", base, f.tokens[api.RoleOperator], tt.head)
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			b, _ := io.ReadAll(resp.Body)
			wantProblem(t, answer{resp.StatusCode, resp.Header, b}, 400, api.CodeIncomplete, "")
		})
	}
	want[api.Image](t, f.do(call{method: "PUT", path: "images/deb/content", body: "hello"}), 200)
}

func TestImageByPathAndNodes(t *testing.T) {
	f := newFixture(t)
	r := want[imageReply](t, f.do(call{method: "POST", path: "images", node: "m2", body: `{"meta":{"name":"a"},"spec":{"path":"/srv/a.qcow2"}}`}), 202)
	if r.Object.Spec.Node != "m2" {
		t.Errorf("node %s", r.Object.Spec.Node)
	}
	wantProblem(t, f.do(call{method: "PUT", path: "images/a/content", body: "x"}), 409, api.CodeRefused, "")
	f.images.without["m2/local"] = true
	r = want[imageReply](t, f.do(call{method: "POST", path: "images", node: "m2", body: `{"meta":{"name":"b"}}`}), 202)
	if r.Object.Spec.Node == "" {
		t.Error("no node keeps the image")
	}
	wantProblem(t, f.do(call{method: "POST", path: "images", node: "m2", body: `{"meta":{"name":"c"},"spec":{"path":"/srv/a"}}`}), 409, api.CodeRefused, "")
	r = want[imageReply](t, f.do(call{method: "POST", path: "images", node: "m2", body: `{"meta":{"name":"d"},"spec":{"path":"/srv/a","node":"m1"}}`}), 202)
	if r.Object.Spec.Node != "m1" {
		t.Errorf("node %s", r.Object.Spec.Node)
	}
	f.setNodePhase("m1", api.NodeLost)
	wantProblem(t, f.do(call{method: "POST", path: "images", node: "m2", body: `{"meta":{"name":"e"},"spec":{"node":"m1"}}`}), 409, api.CodeRefused, "")
	for body, field := range map[string]string{
		`{"meta":{"name":"x"},"spec":{"path":"../a"}}`: "spec.path", `{"meta":{"name":"x"},"spec":{"path":"/a/../b"}}`: "spec.path",
		`{"meta":{"name":"x"},"spec":{"sha256":"12"}}`: "spec.sha256", `{"meta":{"name":"../x"}}`: "meta.name",
		`{"meta":{"name":"x"},"spec":{"pool":"../x"}}`: "spec.pool",
	} {
		wantProblem(t, f.do(call{method: "POST", path: "images", body: body}), 422, api.CodeInvalid, field)
	}
	wantProblem(t, f.do(call{method: "POST", path: "images", body: `{"meta":{"name":"x"},"spec":{"pool":"nope"}}`}), 404, api.CodeNotFound, "spec.pool")
	wantProblem(t, f.do(call{method: "PATCH", path: "images/a", body: `{"spec":{"path":"/etc/shadow"}}`, role: api.RoleOperator}), 409, api.CodeRefused, "")
	want[any](t, f.do(call{method: "PATCH", path: "images/a", body: `{"meta":{"labels":{"os":"debian"}}}`}), 200)
}

func TestDeleteIsRefusedWhileInUse(t *testing.T) {
	f := newFixture(t)
	want[any](t, f.do(call{method: "POST", path: "volumes", body: `{"meta":{"name":"data"},"spec":{"image":"tiny"}}`}), 202)
	vol := want[api.Volume](t, f.do(call{method: "GET", path: "volumes/data"}), 200)
	if vol.Spec.Pool != "shared" || vol.Spec.Node != "m1" {
		t.Errorf("%+v", vol.Spec)
	}
	p := wantProblem(t, f.do(call{method: "DELETE", path: "images/tiny"}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "volume data") {
		t.Error(p.Detail)
	}
	p = wantProblem(t, f.do(call{method: "DELETE", path: "pools/shared"}), 409, api.CodeRefused, "")
	if !strings.Contains(p.Detail, "volume data") {
		t.Error(p.Detail)
	}
	r := want[struct {
		Task   api.Task
		Object api.Volume
	}](t, f.do(call{method: "DELETE", path: "volumes/data"}), 202)
	if r.Object.Meta.DeletingAt == nil || r.Task.Spec.Action != api.ActionVolumeDelete {
		t.Errorf("%+v", r)
	}
	wantProblem(t, f.do(call{method: "POST", path: "vms", body: vmBody("a", api.VMDisk{Volume: "data"})}), 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "POST", path: "volumes", body: `{"meta":{"name":"v"},"spec":{}}`}), 422, api.CodeInvalid, "spec.size")
	wantProblem(t, f.do(call{method: "POST", path: "volumes", body: `{"meta":{"name":"v"},"spec":{"size":"900000T"}}`}), 422, api.CodeInvalid, "spec.size")
}

func TestPools(t *testing.T) {
	f := newFixture(t)
	p := want[api.Pool](t, f.do(call{method: "POST", path: "pools", body: `{"meta":{"name":"fast"},"spec":{"path":"/srv/fast"}}`}), 201)
	if p.Spec.Type != api.PoolDir {
		t.Error(p.Spec)
	}
	wantProblem(t, f.do(call{method: "POST", path: "pools", body: `{"meta":{"name":"fast2"},"spec":{"path":"/srv/fast","type":"shared"}}`}), 409, api.CodeRefused, "")
	wantProblem(t, f.do(call{method: "POST", path: "pools", body: `{"meta":{"name":"fast"},"spec":{"path":"/srv/other"}}`}), 409, api.CodeExists, "")
	wantProblem(t, f.do(call{method: "POST", path: "pools", body: `{"meta":{"name":"x"},"spec":{}}`}), 422, api.CodeInvalid, "spec.path")
	wantProblem(t, f.do(call{method: "POST", path: "pools", body: `{"meta":{"name":"x"},"spec":{"path":"/srv/../etc"}}`}), 422, api.CodeInvalid, "spec.path")
	wantProblem(t, f.do(call{method: "DELETE", path: "pools/local"}), 409, api.CodeRefused, "")
	shared := want[api.Pool](t, f.do(call{method: "GET", path: "pools/shared"}), 200)
	if len(shared.Status.Nodes) != 2 || !shared.Status.Nodes[0].Ready {
		t.Errorf("%+v", shared.Status)
	}
	want[any](t, f.do(call{method: "DELETE", path: "pools/fast"}), 204)
	want[any](t, f.do(call{method: "POST", path: "pools", body: `{"meta":{"name":"fast"},"spec":{"path":"/srv/fast"}}`}), 201)
}

func TestConcurrentPoolsOnOnePathHaveOneWinner(t *testing.T) {
	f := newFixture(t)
	var wg sync.WaitGroup
	var status [8]int
	for i := range status {
		wg.Go(func() {
			a, _ := f.try(call{method: "POST", path: "pools", body: fmt.Sprintf(`{"meta":{"name":"p%d"},"spec":{"path":"/srv/same"}}`, i)})
			status[i] = a.status
		})
	}
	wg.Wait()
	pools, _ := configdb.Pools.List(f.db.Local())
	if len(pools) != 3 {
		t.Errorf("%d pools, statuses %v", len(pools), status)
	}
}
