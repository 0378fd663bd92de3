// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import "testing"

func TestForecastOfAMigration(t *testing.T) {
	for name, c := range map[string]struct {
		plan               MigrationPlan
		limit              int
		leastTotal, most   int64
		leastDown, mostDow int64
		converges, assumed bool
	}{
		"an idle guest":                        {MigrationPlan{Memory: 1 * GiB, Bandwidth: 100 * MiB}, 300, 10_240, 10_400, 60, 70, true, false},
		"one that writes":                      {MigrationPlan{Memory: 1 * GiB, Bandwidth: 100 * MiB, DirtyRate: 50 * MiB}, 300, 20_000, 20_500, 160, 361, true, false},
		"one that writes faster than the line": {MigrationPlan{Memory: 1 * GiB, Bandwidth: 100 * MiB, DirtyRate: 200 * MiB}, 300, 300_000, 400_000, 360, 360, false, false},
		"with a disk":                          {MigrationPlan{Memory: 100 * MiB, Bandwidth: 100 * MiB, Volumes: []PlannedVolume{{"a", 10 * GiB}}}, 0, 103_000, 104_500, 60, 361, true, false},
		"no bound":                             {MigrationPlan{Memory: 112 * MiB}, 300, 1000, 1100, 60, 70, true, true},
		"a guest that is smaller than the downtime": {MigrationPlan{Memory: 10 * MiB, Bandwidth: 100 * MiB}, 300, 160, 160, 160, 160, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			p := c.plan
			p.Forecast(c.limit)
			if p.TotalMillis < c.leastTotal || p.TotalMillis > c.most || p.DowntimeMillis < c.leastDown || p.DowntimeMillis > c.mostDow || p.Converges != c.converges || p.Assumed != c.assumed {
				t.Errorf("%+v", p)
			}
		})
	}
}
